"""An interrupted run ends like one that was not: to the bit with the same ranks, closely with
others. Dropout is on: nothing random is carried in a checkpoint."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import raylign

sys.path.insert(0, str(Path(__file__).parent))

from resume_rank import EVERY, STEPS, VOCABULARY, list_cases, make_task, run_until

from raylign.config import EngineConfig
from raylign.data.packing import ShardWriter, pack, write_index
from raylign.models.loading import load_model, load_tokenizer
from raylign.tracking import EVENTS_FILE, METRICS_FILE, read_lines
from raylign.training.checkpoints import EXPORT, STATE, list_checkpoints, read_manifest, verify
from raylign.training.fragments import StoredState
from raylign.training.loop import CHECKPOINTS, SupervisedLoop

RANKS = 2


@pytest.fixture(scope="module")
def root(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything has run: all cases on two ranks, and a chain of ranks and engines on one task."""
    directory = tmp_path_factory.mktemp("resume")
    write_inputs(directory / "inputs", tiny_model)
    alone = EngineConfig(backend="torch")
    inputs = directory / "inputs"
    SupervisedLoop(make_task(inputs, directory / "undisturbed", alone, dropout=0.0)).run()
    run_until(make_task(inputs, directory / "chain", alone, dropout=0.0), 4)
    environment = os.environ | {
        "PYTHONPATH": str(Path(raylign.__file__).parents[1]),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = str(Path(__file__).with_name("resume_rank.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(directory), str(rank), str(RANKS), port],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    SupervisedLoop(make_task(inputs, directory / "chain", alone, dropout=0.0)).run()
    return directory


def write_inputs(directory: Path, tokenizer: Path) -> None:
    stream = np.random.default_rng(0)
    documents = [
        (stream.integers(50) + np.arange(stream.integers(4, 20)) * stream.integers(1, 4)) % 50 + 4
        for _ in range(120)
    ]
    tokens, segments = pack(documents, 16, eos=1, pad=0)
    writers = {}
    (directory / "shards").mkdir(parents=True)
    for split, part in (("train", slice(10, None)), ("validation", slice(0, 10))):
        writers[split] = ShardWriter(directory / "shards", split, VOCABULARY)
        writers[split].write(tokens[part], segments[part])
    write_index(directory / "shards", 16, VOCABULARY, "hash", writers)
    shutil.copytree(tokenizer, directory / "tokenizer")


def read_started(output: Path) -> list[int]:
    return [row["step"] for row in read_lines(output / EVENTS_FILE) if row["what"] == "started"]


@pytest.mark.slow
@pytest.mark.parametrize("case", list_cases())
def test_resuming_is_exact_on_the_same_ranks(root: Path, case: str) -> None:
    whole, resumed = root / "whole" / case, root / "resumed" / case
    assert read_started(resumed) == [0, 6]
    ours, theirs = (path / "model" / "model.safetensors" for path in (resumed, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    states = [
        StoredState(path / CHECKPOINTS / "step-00000009" / STATE) for path in (resumed, whole)
    ]
    for name in states[0].names:
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(states[0].whole(name, kind), states[1].whole(name, kind))
    recorded = [
        [(row["step"], row["loss"], row["grad_norm"]) for row in read_lines(path / METRICS_FILE)]
        for path in (resumed, whole)
    ]
    assert recorded[0] == recorded[1]


def test_dropout_was_on(root: Path) -> None:
    with_dropout = read_lines(root / "whole" / "torch" / METRICS_FILE)[0]["loss"]
    assert with_dropout != read_lines(root / "undisturbed" / METRICS_FILE)[0]["loss"]


@pytest.mark.slow
def test_other_ranks_and_stages_go_on_where_others_stopped(root: Path) -> None:
    """One rank of torch, two of ZeRO-1, two of ZeRO-3, one of torch: a row that was lost or came
    twice would bend the curve."""
    assert read_started(root / "chain") == [0, 3, 6, 9]
    curves = [
        {row["step"]: row for row in read_lines(root / name / METRICS_FILE)}
        for name in ("chain", "undisturbed")
    ]
    assert curves[0].keys() == curves[1].keys() >= set(range(EVERY, STEPS + 1, EVERY))
    for step, row in curves[1].items():
        for name in ("loss", "validation_loss", "grad_norm"):
            if name in row:
                assert curves[0][step][name] == pytest.approx(row[name], abs=2e-5), (step, name)
    ours, theirs = (
        load_file(root / name / "model" / "model.safetensors") for name in ("chain", "undisturbed")
    )
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", ["torch", "zero3", "zero1-bfloat16", "tensor"])
def test_every_checkpoint_is_whole_and_holds_a_model(root: Path, case: str) -> None:
    found = list_checkpoints(root / "whole" / case / CHECKPOINTS)
    assert [path.name for path in found] == ["step-00000006", "step-00000009"], "the newest two"
    for path in found:
        manifest = verify(path)
        assert manifest.ranks == RANKS and manifest.identity["seed"] == 2
        assert manifest.progress["tokens"] > 0
        parts = [name for name in manifest.files if name.startswith(STATE)]
        # What ranks share out they write themselves; what all hold is written once.
        assert len(parts) == (1 if case == "torch" else RANKS)
        model = load_model(path / EXPORT, "bfloat16" if "bfloat16" in case else "float32")
        assert load_tokenizer(path / EXPORT).chat_template
        stored = StoredState(path / STATE)
        weights = dict(model.named_parameters())
        assert set(stored.names) == set(weights)
        for name, weight in weights.items():
            assert torch.equal(stored.whole(name).to(weight.dtype), weight)


def test_a_state_does_not_depend_on_who_wrote_it(root: Path) -> None:
    """Ranks of ZeRO-1, of ZeRO-3 and of cut matrices leave the same state in other pieces."""
    for names in (("zero1", "zero3"), ("torch", "tensor")):
        first, other = (
            StoredState(root / "whole" / name / CHECKPOINTS / "step-00000006" / STATE)
            for name in names
        )
        for name in first.names:
            assert torch.allclose(first.whole(name), other.whole(name), atol=2e-5)
            assert first.step(name) == other.step(name) == 6


def test_what_the_first_rank_refuses_all_ranks_refuse(root: Path) -> None:
    """Else the others would wait for it."""
    refusals = {(root / f"refusal-{rank}").read_text() for rank in range(RANKS)}
    [text] = refusals
    assert "step-00000009 is a checkpoint of another seed (2, not 9)" in text


def test_world_size_is_not_part_of_what_a_checkpoint_belongs_to(root: Path) -> None:
    found = read_manifest(root / "chain" / CHECKPOINTS / "step-00000009")
    assert "ranks" not in found.identity and found.ranks == RANKS
