"""Pre-training and fine-tuning as jobs: real Ray Train workers, DeepSpeed, and a killed rank."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs import pretrain, sft
from raylign.config import (
    CheckpointConfig,
    ModelConfig,
    PretrainConfig,
    Recipe,
    SftConfig,
    UserError,
    load_recipe,
)
from raylign.data.packing import ShardWriter, pack, write_index
from raylign.data.textbook.arithmetic import draw_problem, write_exercise, write_textbook
from raylign.models.loading import initialise, load_tokenizer, save_model
from raylign.models.presets import build_config
from raylign.run import Run, Stage
from raylign.tokenization.train import train_bpe
from raylign.tracking import EVENTS_FILE, METRICS_FILE, ProgressBoard, read_lines
from raylign.training.checkpoints import list_checkpoints, verify
from raylign.training.heartbeat import read_marks

TAGS = ("<work>", "</work>", "<answer>", "</answer>")
SHAPE = ModelConfig(hidden_size=32, layers=2, ffn_size=48, context=128)
PRETRAIN = PretrainConfig(
    model=SHAPE,
    steps=60,
    batch_size=6,
    micro_batch_size=2,
    checkpoint_every=10,
    checkpoints=CheckpointConfig(keep=1, after="models"),
    sample_prompts=("What is ",),
    sample_tokens=8,
)
SFT = SftConfig(
    steps=12,
    batch_size=5,
    micro_batch_size=2,
    sequence_length=128,
    checkpoint_every=4,
    checkpoints=CheckpointConfig(keep=1, after="all"),
    validation_share=0.1,
    sample_prompts=("What is 1 + 2?",),
    sample_tokens=8,
)


def write_inputs(root: Path) -> Run:
    """The stages that training reads, small and made directly."""
    run = Run(root)
    texts = list(write_textbook(300, 0, 2, 0.8))
    with run.write("corpus", {}, {}) as draft:
        rng = random.Random(0)
        rows = [write_exercise(draw_problem(rng, 2), rng, 0.5) for _ in range(200)]
        lines = [json.dumps({"messages": messages}) for messages in rows]
        lines.insert(7, '{"messages": []}')
        (draft.path / "exercises.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with run.write("tokenizer", {}, {}) as draft:
        tokenizer = train_bpe(texts, 360, TAGS)
        tokenizer.save_pretrained(draft.path)
    documents = [np.array(tokenizer.encode(text)) for text in texts]
    tokens, segments = pack(documents, 64, tokenizer.eos_token_id, tokenizer.pad_token_id)
    with run.write("shards", {}, {}) as draft:
        writers = {}
        for split, part in (("train", slice(16, None)), ("validation", slice(0, 16))):
            writers[split] = ShardWriter(draft.path, split, len(tokenizer))
            writers[split].write(tokens[part], segments[part])
        content = run.require("tokenizer", "tokenizer").manifest.content
        write_index(draft.path, 64, len(tokenizer), content, writers)
    return run


def make_recipe(run: Run, **sections: object) -> Recipe:
    return Recipe(run=run.root, seed=3, **sections)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def board() -> ProgressBoard:
    return ProgressBoard(Console(quiet=True))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_inputs(tmp_path_factory.mktemp("inputs") / "run")


@pytest.fixture(scope="module")
def trained(ray_cluster: None, inputs: Run, board: ProgressBoard) -> Run:
    """Pre-trained, then fine-tuned; nothing went wrong."""
    pretrain.run(make_recipe(inputs, pretrain=PRETRAIN), inputs, board)
    sft.run(make_recipe(inputs, sft=SFT), inputs, board)
    return inputs


@pytest.fixture
def fresh(inputs: Run, tmp_path: Path) -> Run:
    """The inputs alone, in a run directory of its own."""
    for name in ("corpus", "tokenizer", "shards"):
        shutil.copytree(inputs.root / name, tmp_path / "run" / name)
    return Run(tmp_path / "run")


def read_weights(stage: Stage) -> dict[str, torch.Tensor]:
    return load_file(stage.path / "model" / "model.safetensors")


@pytest.mark.slow
def test_pretraining_leaves_a_model_that_has_learnt(trained: Run) -> None:
    stage = trained.require("pretrain", "pretrain")
    summary = stage.manifest.summary
    model = AutoModelForCausalLM.from_pretrained(stage.path / "model")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["initial_loss"] == pytest.approx(math.log(360), rel=0.05)
    assert summary["loss"] < summary["initial_loss"] - 1.5
    assert summary["validation_loss"] == pytest.approx(summary["loss"], rel=0.15)
    assert summary["tokens"] == pytest.approx(60 * 6 * 64, rel=0.01)
    assert summary["restarts"] == 0 and summary["tokens_per_second"] > 0
    rows = read_lines(stage.path / METRICS_FILE)
    assert [row["step"] for row in rows] == [1, 10, 20, 30, 40, 50, 60]
    assert rows[0].keys() >= {"loss", "lr", "grad_norm", "tokens_per_second"}
    assert [row["step"] for row in read_lines(stage.path / "samples.jsonl")] == [
        10, 20, 30, 40, 50, 60,
    ]  # fmt: skip
    assert set(stage.manifest.parents) == {"shards", "tokenizer"}
    kept = {name.split("/")[0] for name in stage.manifest.files}
    assert kept == {"model", METRICS_FILE, EVENTS_FILE, "samples.jsonl", "curve.svg", "checkpoints"}
    assert not list((stage.path).glob(".*")), "nothing else is left"
    [checkpoint] = (stage.path / "checkpoints").iterdir()  # as many as asked for, as asked for
    assert checkpoint.name == "step-00000050"
    assert [path.name for path in checkpoint.iterdir()] == ["hf"]
    saved = [
        row["step"] for row in read_lines(stage.path / EVENTS_FILE) if row["what"] != "started"
    ]
    assert saved == [10, 20, 30, 40, 50]


@pytest.mark.slow
def test_fine_tuning_goes_on_from_there(trained: Run) -> None:
    stage = trained.require("sft", "sft")
    summary = stage.manifest.summary
    assert summary["conversations"] == 200 and summary["rejected"] == 1
    assert summary["rejected_reasons"] == {"no messages": 1}
    assert summary["loss"] < summary["initial_loss"]
    assert summary["initial_loss"] < math.log(360) - 0.5, "it starts from the pre-trained weights"
    assert stage.manifest.parents["model"] == trained.require("pretrain", "").manifest.content
    tokenizer = AutoTokenizer.from_pretrained(stage.path / "model")
    assert tokenizer.chat_template and tokenizer.eos_token == "<eos>"
    [first, *_] = read_lines(stage.path / "samples.jsonl")
    assert first["prompt"] == "What is 1 + 2?"
    [checkpoint] = list_checkpoints(stage.path / "checkpoints")
    assert verify(checkpoint).step == 8


@pytest.mark.slow
def test_a_finished_stage_is_not_done_again(trained: Run, board: ProgressBoard) -> None:
    before = read_lines(trained.root / "pretrain" / METRICS_FILE)
    pretrain.run(make_recipe(trained, pretrain=PRETRAIN), trained, board)
    assert read_lines(trained.root / "pretrain" / METRICS_FILE) == before


@pytest.mark.slow
def test_ranks_that_die_or_hang_change_nothing_but_the_time(
    trained: Run, fresh: Run, board: ProgressBoard
) -> None:
    """A worker is killed after the first checkpoint, and one of its successors stopped for good
    after the next: the others wait for it, and nobody else's timeout ends that first. The weights
    are those of the undisturbed run."""
    harmed: list[int] = []
    thread = threading.Thread(target=_harm_workers, args=(fresh, harmed), daemon=True)
    thread.start()
    engine = PRETRAIN.engine.model_copy(update={"timeout_s": 16.0})
    config = PRETRAIN.model_copy(update={"engine": engine})
    pretrain.run(make_recipe(fresh, pretrain=config), fresh, board)
    thread.join(5)
    ours, theirs = (run.require("pretrain", "pretrain") for run in (fresh, trained))
    assert len(harmed) == 2 and ours.manifest.summary["restarts"] == 2
    starts = list_starts(ours)
    assert starts[0] == 0 and 10 <= starts[1] < starts[2] <= 50
    [hung] = [row for row in read_lines(ours.path / EVENTS_FILE) if row["what"] == "hung"]
    assert hung["rank"] == 1
    assert f"process {harmed[1]}) has given no sign for 12 s in step " in hung["text"]
    recorded = [
        [(row["step"], row["loss"], row.get("validation_loss")) for row in rows]
        for rows in (read_lines(stage.path / METRICS_FILE) for stage in (ours, theirs))
    ]
    assert recorded[0] == recorded[1]
    weights, undisturbed = read_weights(ours), read_weights(theirs)
    assert all(torch.equal(weights[name], undisturbed[name]) for name in undisturbed)


def list_starts(stage: Stage) -> list[int]:
    rows = read_lines(stage.path / EVENTS_FILE)
    return [row["step"] for row in rows if row["what"] == "started"]


def _harm_workers(run: Run, harmed: list[int]) -> None:
    """Kill a rank once there is a checkpoint, and stop one of the next group once it has saved."""
    draft, saved = run.root / ".pretrain.partial", 0
    for number in (signal.SIGKILL, signal.SIGSTOP):

        def is_ready(saved: int = saved) -> bool:
            there = [mark.pid for mark in read_marks(draft / ".heartbeats")]
            new = len(there) == 2 and not set(harmed) & set(there)
            return new and newest_step(draft / ".checkpoints") > saved

        if not wait_for(is_ready):
            return
        saved = newest_step(draft / ".checkpoints")
        [_, mark] = read_marks(draft / ".heartbeats")
        harmed.append(mark.pid)
        os.kill(mark.pid, number)


def newest_step(store: Path) -> int:
    found = list_checkpoints(store)
    return int(found[-1].name.removeprefix("step-")) if found else 0


@pytest.mark.slow
def test_a_killed_job_goes_on_from_its_newest_checkpoint(
    trained: Run, fresh: Run, board: ProgressBoard
) -> None:
    """The whole tree of processes is killed in the middle of a checkpoint: the same recipe ends
    with the same model."""
    recipe = fresh.root.parent / "recipe.json"
    section = PRETRAIN.model_dump(mode="json", exclude_unset=True)
    recipe.write_text(json.dumps({"run": str(fresh.root), "seed": 3, "pretrain": section}))
    store = fresh.root / ".pretrain.partial" / ".checkpoints"

    with start_job(recipe) as job:
        assert wait_for(lambda: [p for p in store.glob(".step-*") if newest_step(store) >= 10])
        kill_tree(job)
    before = newest_step(store)
    assert 10 <= before <= 50
    pretrain.run(load_recipe(recipe), fresh, board)  # here: another process costs a minute
    ours, theirs = (run.require("pretrain", "pretrain") for run in (fresh, trained))
    assert list_starts(ours) == [0, before]
    hashes = [
        {name: file["sha256"] for name, file in stage.manifest.files.items() if "model/" in name}
        for stage in (ours, theirs)
    ]
    assert hashes[0] == hashes[1]


@contextmanager
def start_job(recipe: Path) -> Iterator[subprocess.Popen[str]]:
    root = Path(pretrain.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.pretrain", str(recipe)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": f"{root / 'platform'}:{root}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        kill_tree(process)
        process.communicate()


def kill_tree(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in tree:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(tree[1:], 30)


def wait_for(condition: Callable[[], object], seconds: float = 200.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


@pytest.mark.slow
def test_a_mistake_found_by_a_worker_is_one_line(
    ray_cluster: None, fresh: Run, board: ProgressBoard
) -> None:
    tokenizer = load_tokenizer(fresh.root / "tokenizer")
    broken = initialise(build_config(SHAPE, len(tokenizer), pad_id=0, eos_id=1), 0)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    save_model(broken, broken.config, tokenizer, fresh.root / "broken")
    config = PRETRAIN.model_copy(update={"model": str(fresh.root / "broken")})
    with pytest.raises(UserError) as caught:
        pretrain.run(make_recipe(fresh, pretrain=config), fresh, board)
    assert str(caught.value) == (
        "pretrain: the norm of the gradient is inf at step 1, and no rank has taken it; lower "
        "pretrain.optimizer.lr or raise pretrain.schedule.warmup_steps; the step's rows are in "
        f"{fresh.root}/diverged/pretrain-step-00000001"
    )
    assert fresh.find("pretrain") is None


def refuse(job: object, run: Run, board: ProgressBoard, **sections: object) -> str:
    with pytest.raises(UserError) as caught:
        job.run(make_recipe(run, **sections), run, board)  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_refused_before_workers_start(
    ray_cluster: None, fresh: Run, board: ProgressBoard
) -> None:
    def change(**update: object) -> str:
        return refuse(pretrain, fresh, board, pretrain=PRETRAIN.model_copy(update=update))

    assert "pretrain.model.context=32 is shorter than rows of 64 tokens" in change(
        model=SHAPE.model_copy(update={"context": 32})
    )
    assert "made with another tokenizer" in change(tokenizer=fresh.root / "shards")
    workers = PRETRAIN.workers.model_copy(update={"count": 50})
    assert "50 ranks of 1 CPU do not fit the 2 CPU of the cluster" in change(workers=workers)
    own = load_tokenizer(fresh.root / "tokenizer")
    model = initialise(build_config(SHAPE, len(own), pad_id=0, eos_id=1), 0)
    for name, tokenizer in (("own", own), ("other", train_bpe(["zebras " * 9], 266, TAGS))):
        save_model(model, model.config, tokenizer, fresh.root / name)
    said = change(model=str(fresh.root / "other"), workers=workers)
    assert (
        f"pretrain.model={fresh.root}/other comes with another tokenizer than the shards'" in said
    )
    assert "50 ranks" in change(model=str(fresh.root / "own"), workers=workers)
    assert "no finished 'pretrain' stage" in refuse(sft, fresh, board, sft=SFT)
    assert "no 'sft' section" in refuse(sft, fresh, board)


def test_fine_tuning_refuses_what_it_cannot_use(
    ray_cluster: None, fresh: Run, board: ProgressBoard, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(fresh.root / "tokenizer")
    model = initialise(build_config(SHAPE, len(tokenizer), pad_id=0, eos_id=1), 0)
    save_model(model, model.config, tokenizer, tmp_path / "model")

    def change(**update: object) -> str:
        config = SFT.model_copy(update={"model": tmp_path / "model", **update})
        return refuse(sft, fresh, board, sft=config)

    assert "sft.sequence_length=200 exceeds the context" in change(sequence_length=200)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n', encoding="utf-8")
    assert "1 of 1 rows cannot be used: 1 x no assistant turn" in change(data=rows)
    assert "no such file" in change(data=tmp_path / "none.jsonl")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert "has no chat template" in change()
