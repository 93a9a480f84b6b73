"""Layers on several ranks take the same steps as the whole model on one."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import raylign

sys.path.insert(0, str(Path(__file__).parent))

from pipeline_rank import FOUR, PAIRS, STEPS, Case, build_model, draw_rows, pipe, run_case

from raylign.config import (
    EngineConfig,
    OptimizerConfig,
    ScheduleConfig,
    UserError,
    WorkersConfig,
)
from raylign.data.packing import ShardWriter, pack, write_index
from raylign.models.assembly import ModelPlan
from raylign.models.heads import build_scorer
from raylign.tracking import METRICS_FILE, ProgressBoard, read_lines
from raylign.training.engine import build_engine
from raylign.training.loop import SupervisedLoop, SupervisedTask
from raylign.training.objectives import LanguageObjective, embed_batch
from raylign.training.pipeline_stage import Stage, divide
from raylign.training.supervised import train

pytestmark = pytest.mark.slow

CASES: dict[str, Case] = {**FOUR, **PAIRS[0], **PAIRS[1]}
EXACT = [name for name in CASES if "bfloat16" not in name]

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each of four ranks found in the cases it took part in."""
    directory = tmp_path_factory.mktemp("ranks")
    source = Path(raylign.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("pipeline_rank.py"))
    ports = [str(_free_port()) for _ in range(3)]
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(directory), str(rank), *ports],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(4)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert not any(process.returncode for process in processes), "".join(outputs)
    return [torch.load(directory / f"rank-{rank}.pt") for rank in range(4)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, int, int], dict[str, Any]]:
    """Plain torch on one process, by model, rows and steps."""
    return {}


def look_up(alone: dict[tuple[str, int, int], Any], case: Case) -> dict[str, Any]:
    key = case.model, case.rows, case.steps
    if key not in alone:
        alone[key] = run_case(case.alone(), Path())
    found: dict[str, Any] = alone[key]
    return found


def select(ranks: Found, name: str) -> Found:
    return [found[name] for found in ranks if name in found]


def widest_gap(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def test_three_cases_go_on_for_twenty_steps_in_float32() -> None:
    assert [name for name in EXACT if CASES[name].steps == STEPS == 20] == ["2x2", "4-stages", "2"]


@pytest.mark.parametrize("name", EXACT)
def test_stages_take_the_steps_of_one_process(ranks: Found, alone: Any, name: str) -> None:
    reference = look_up(alone, CASES[name])
    for found in select(ranks, name):  # every rank knows the same
        assert found["losses"] == pytest.approx(reference["losses"], abs=5e-6)
        assert found["norms"] == pytest.approx(reference["norms"], abs=5e-6)
        assert found["measured"] == pytest.approx(reference["measured"], abs=5e-6)
        assert widest_gap(found["weights"], reference["weights"]) < 1e-5
    first, *others = select(ranks, name)
    assert first["given"] == len(first["weights"])
    assert not any(found["given"] for found in others), "each would need room for the model"


@pytest.mark.parametrize("name", [name for name in CASES if "bfloat16" in name])
def test_bfloat16_follows_float32(ranks: Found, alone: Any, name: str) -> None:
    reference = look_up(alone, CASES[name])
    for found in select(ranks, name):
        assert found["losses"] == pytest.approx(reference["losses"], abs=3e-2)
        assert found["norms"] == pytest.approx(reference["norms"], rel=0.1)
        assert all(t.dtype == torch.bfloat16 for t in found["held"].values())
        assert found["buffers"] == {torch.float32}, "rotary frequencies"
        owned = [t for tensors in found["owned"].values() for t in tensors.values()]
        assert owned and all(t.dtype == torch.float32 for t in owned)


@pytest.mark.parametrize(("whole", "parts"), [("2x2", "2x2-resumed"), ("2-bfloat16",) * 2])
def test_resuming_changes_nothing(ranks: Found, whole: str, parts: str) -> None:
    parts = parts if parts != whole else f"{whole}-resumed"
    ours, theirs = select(ranks, parts)[0], select(ranks, whole)[0]
    steps = CASES[parts].steps
    assert ours["losses"] == theirs["losses"][:steps]
    assert ours["norms"] == theirs["norms"][:steps]
    if steps == CASES[whole].steps:
        assert widest_gap(ours["weights"], theirs["weights"]) == 0.0


def test_a_rank_holds_its_own_layers_only(ranks: Found, alone: Any) -> None:
    for name, parts in (("2-untied", 2), ("2x2-replicas", 2), ("4-stages", 4)):
        whole = look_up(alone, CASES[name])["bytes"]
        held = [found["bytes"] for found in select(ranks, name)]
        # The most expensive part of this division is no layer above the fair share.
        assert max(held) < whole / parts + whole / 4
        twice = 64 * 32 * 4 if CASES[name].model == "tied" else 0
        copies = len(held) // parts
        assert sum(held) == copies * (whole + twice)


def test_replicas_share_out_optimizer_state(ranks: Found) -> None:
    for name, shared in (("2x2", True), ("2x2-replicas", False), ("4-stages", True)):
        found = select(ranks, name)
        names = [set(rank["owned"]) for rank in found]
        whole = found[0]["weights"]
        for weight in whole:  # written by one rank, tied ones too
            assert sum(weight in owned for owned in names) == 1
        assert [bool(owned) for owned in names] == [True, shared, True, shared]
        sizes = [sum(whole[weight].numel() for weight in owned) for owned in names]
        if name == "2x2":
            assert max(sizes) < 0.3 * sum(sizes)


def test_tied_embeddings_stay_the_same_on_both_ends(ranks: Found) -> None:
    for name in ("2x2", "4-stages", "2", "2-bfloat16"):
        found = select(ranks, name)
        tied = [rank["held"].get("model.embed_tokens.weight") for rank in found]
        assert sum(weight is not None for weight in tied) == (4 if name == "2x2" else 2)
        assert all(torch.equal(tied[0], weight) for weight in tied if weight is not None)


def test_no_rank_takes_a_step_without_a_gradient(ranks: Found) -> None:
    for found in ranks:
        assert found["diverged"] == {
            "said": "the norm of the gradient is nan",
            "unchanged": True,
        }


def test_a_part_of_a_model_is_not_called_as_if_it_were_whole(ranks: Found) -> None:
    assert [len(found["refused"]) for found in ranks] == [2, 3, 2, 3]
    assert all("engine.pipeline_parallel > 1" in s for found in ranks for s in found["refused"])


@pytest.mark.usefixtures("ray_cluster")
def test_the_supervised_loop_runs_on_a_pipeline(tiny_model: Path, tmp_path: Path) -> None:
    """Ray Train starts the ranks; compared with the same loop in this process."""
    stream = np.random.default_rng(0)
    documents = [stream.integers(4, 57, stream.integers(4, 20)) for _ in range(60)]
    tokens, segments = pack(documents, 16, eos=1, pad=0)
    writers = {}
    for split, part in (("train", slice(6, None)), ("validation", slice(0, 6))):
        writers[split] = ShardWriter(tmp_path, split, 57)
        writers[split].write(tokens[part], segments[part])
    write_index(tmp_path, 16, 57, "hash", writers)
    whole = SupervisedTask(
        name="pretrain",
        output=tmp_path / "whole",
        model=ModelPlan(build_model("tied", 7).config, seed=1),
        tokenizer=tiny_model,
        objective=LanguageObjective(tmp_path, "corpus"),
        seed=2,
        steps=6,
        batch_size=6,
        micro_batch_size=2,
        checkpoint_every=3,
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=2),
        engine=EngineConfig(backend="torch"),
        threads=1,
        prompts=(("w1 w2", (4, 5)),),
        sample_tokens=5,
    )
    shared = replace(whole, output=tmp_path / "shared", engine=pipe())
    for task in (whole, shared):
        task.output.mkdir()
    SupervisedLoop(whole).run()
    with ProgressBoard() as board, board.bar("pretrain", shared.steps) as bar:
        summary = train(shared, WorkersConfig(count=2), bar)
    ours, theirs = (read_lines(task.output / METRICS_FILE) for task in (shared, whole))
    assert [row["step"] for row in ours] == [1, 3, 6]
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "validation_loss", "grad_norm"):
            assert a.get(key) == pytest.approx(b.get(key), abs=2e-5)
    samples = [read_lines(task.output / "samples.jsonl") for task in (shared, whole)]
    assert samples[0] == samples[1] and len(samples[0]) == 2
    exported = AutoModelForCausalLM.from_pretrained(shared.output / "model")
    expected = AutoModelForCausalLM.from_pretrained(whole.output / "model").state_dict()
    assert widest_gap(exported.state_dict(), expected) < 1e-4
    assert summary["parameters"] == sum(p.numel() for p in exported.parameters())


@pytest.mark.parametrize(
    ("costs", "parts", "bounds"),
    [
        ((1, 1, 1, 1), 2, (0, 2, 4)),
        ((9, 1, 1, 1, 1, 1), 2, (0, 1, 6)),
        ((3, 1, 1, 1, 3), 3, (0, 1, 4, 5)),
        ((1, 2, 3), 3, (0, 1, 2, 3)),
        ((5,), 1, (0, 1)),
    ],
)
def test_layers_are_divided_evenly(
    costs: tuple[int, ...], parts: int, bounds: tuple[int, ...]
) -> None:
    assert divide(costs, parts) == bounds


def test_no_division_is_better() -> None:
    stream = torch.Generator().manual_seed(0)
    for _ in range(20):
        costs = torch.randint(1, 20, (7,), generator=stream).tolist()
        for parts in (2, 3, 4):
            every = ((0, *inner, 7) for inner in itertools.combinations(range(1, 7), parts - 1))
            best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise(c)) for c in every)
            found = divide(costs, parts)
            assert max(sum(costs[a:b]) for a, b in itertools.pairwise(found)) == best


def test_a_reward_models_head_is_on_the_last_stage(tiny_model: Path) -> None:
    whole, *parts = (build_scorer(tiny_model, "score", 7).eval() for _ in range(3))
    batch = LanguageObjective(tiny_model, "corpus").assemble(draw_rows(0, 4), slice(0, 4), 0)
    batch.tokens.remainder_(whole.config.vocab_size)
    stages = [Stage(lm, index, 2) for index, lm in enumerate(parts)]
    hidden = None
    for stage in stages:
        hidden = stage.run(batch, hidden)
    assert torch.equal(hidden, embed_batch(whole, batch))
    names = [{name for name, _ in stage.lm.named_parameters()} for stage in stages]
    every = {name for name, _ in whole.named_parameters()}
    assert set.union(*names) == every and sum(map(len, names)) == len(every)
    heads = [n for n in every if "layers" not in n and "embed" not in n and "norm" not in n]
    assert heads and all(name in names[1] for name in heads)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UserError, match="5 stages cannot share 4 layers"):
        Stage(build_model("tied", 0), 0, 5)
    model = build_model("tied", 0)
    model.get_decoder().extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="LlamaForCausalLM has other parts than an embedding"):
        Stage(model, 0, 2)
    with pytest.raises(UserError, match=r"1 ranks cannot be shared out"):
        build_engine(pipe(), build_model("tied", 0), OptimizerConfig())
    with pytest.raises(UserError, match=r"engine.offload=optimizer cannot be combined"):
        build_engine(pipe(offload="optimizer"), build_model("tied", 0), OptimizerConfig())
