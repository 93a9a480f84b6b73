"""The supervised loop in one process: what it records, exports, and resumes."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))


from raylign.config import (
    CheckpointConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    UserError,
)
from raylign.data.chat import Conversation
from raylign.data.packing import ShardWriter, pack, write_index
from raylign.models.assembly import ModelPlan
from raylign.models.loading import initialise, load_model, load_tokenizer, save_model
from raylign.models.presets import build_config
from raylign.tracking import EVENTS_FILE, METRICS_FILE, read_lines
from raylign.training.checkpoints import list_checkpoints
from raylign.training.divergence import keep_rows
from raylign.training.heartbeat import Pulse
from raylign.training.loop import (
    CHECKPOINTS,
    SAMPLES_FILE,
    SupervisedLoop,
    SupervisedTask,
    _rewind,
)
from raylign.training.objectives import LanguageObjective
from raylign.training.rows import (
    CorpusRows,
    DemonstrationRows,
    Rows,
    TextRows,
    write_demonstrations,
)
from raylign.training.sampling import Sampler

VOCABULARY = 57
CONFIG = build_config(
    ModelConfig(hidden_size=16, layers=1, ffn_size=24, context=32), VOCABULARY, pad_id=0, eos_id=1
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that count upwards by a step of their own: easy to learn."""
    directory = tmp_path_factory.mktemp("shards")
    stream = np.random.default_rng(0)
    documents = [
        (stream.integers(50) + np.arange(stream.integers(4, 20)) * stream.integers(1, 4)) % 50 + 4
        for _ in range(200)
    ]
    tokens, segments = pack(documents, 16, eos=1, pad=0)
    writers = {}
    for split, part in (("train", slice(10, None)), ("validation", slice(0, 10))):
        writers[split] = ShardWriter(directory, split, VOCABULARY)
        writers[split].write(tokens[part], segments[part])
    write_index(directory, 16, VOCABULARY, "hash", writers)
    return directory


def make_task(shards: Path, tokenizer: Path, output: Path) -> SupervisedTask:
    output.mkdir(exist_ok=True)
    return SupervisedTask(
        name="pretrain",
        output=output,
        model=ModelPlan(CONFIG, seed=1),
        tokenizer=tokenizer,
        objective=LanguageObjective(shards, "corpus"),
        seed=2,
        steps=25,
        batch_size=6,
        micro_batch_size=4,
        checkpoint_every=8,
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=3),
        engine=EngineConfig(backend="torch"),
        threads=1,
        prompts=(("w1 w2", (4, 5)), ("long", tuple(range(4, 36)))),
        sample_tokens=5,
    )


@pytest.fixture(scope="module")
def finished(
    shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SupervisedTask, dict[str, float]]:
    task = make_task(shards, tiny_model, tmp_path_factory.mktemp("out"))
    return task, SupervisedLoop(task).run()


Finished = tuple[SupervisedTask, dict[str, float]]


def test_it_learns_and_records_what_happened(finished: Finished) -> None:
    task, result = finished
    rows = read_lines(task.output / METRICS_FILE)
    assert [row["step"] for row in rows] == [1, 8, 10, 16, 20, 24, 25]
    assert [row["step"] for row in rows if "validation_loss" in row] == [8, 16, 24, 25]
    assert rows[0]["loss"] == pytest.approx(math.log(VOCABULARY), rel=0.05)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert rows[-1]["validation_loss"] == pytest.approx(rows[-1]["loss"], rel=0.2)
    assert rows[0]["lr"] == pytest.approx(1e-2 / 4) and rows[-1]["lr"] == pytest.approx(1e-3)
    assert all(row["grad_norm"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    assert 24 * 6 * 16 < result["tokens"] <= 25 * 6 * 16  # only the last row has padding
    assert result["parameters"] == sum(p.numel() for p in initialise(CONFIG, 0).parameters())


def test_the_model_is_exported_with_its_tokenizer(finished: Finished) -> None:
    task, _ = finished
    model = load_model(task.output / "model")
    assert load_tokenizer(task.output / "model").chat_template
    row = read_lines(task.output / METRICS_FILE)[-1]
    assert isinstance(task.objective, LanguageObjective)
    rows = CorpusRows(task.objective.directory, "validation", isolate=True).read(range(10))
    tokens, trained = rows.tokens, rows.trained
    losses = []
    for index in range(10):  # alone, without packing: documents end where segments do
        starts = np.flatnonzero(~trained[index])
        for start, end in zip(starts, [*starts[1:], 16], strict=True):
            ids = torch.from_numpy(tokens[index : index + 1, start:end])
            if end - start > 1:
                table = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
                losses += (-table.gather(1, ids[0, 1:, None])).flatten().tolist()
    assert row["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_samples_continue_every_prompt_at_every_checkpoint(finished: Finished) -> None:
    task, _ = finished
    rows = read_lines(task.output / SAMPLES_FILE)
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in (8, 16, 24, 25) for prompt in ("w1 w2", "long")
    ]
    last = load_model(task.output / "model")
    ids = [4, 5]
    for _ in range(5):
        choice = int(last(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(choice)
        if choice == 1:
            break
    tokenizer = load_tokenizer(task.output / "model")
    assert rows[-2]["text"] == tokenizer.decode(ids[2:], skip_special_tokens=True)
    assert rows[-1]["text"] == "", "a prompt that fills the context is not continued"


class _FailingRows(CorpusRows):
    """Stops reading after a number of steps, as a killed process would."""

    left = 20

    def read(self, indices: Sequence[int] | np.ndarray) -> TextRows:
        if len(indices) == 6:
            if self.left == 0:
                raise ConnectionError("gone")
            self.left -= 1
        return super().read(indices)


class _FailingObjective(LanguageObjective):
    def open(self, split: str) -> Rows[TextRows]:
        return _FailingRows(self.directory, split, self.isolate)


def test_an_interrupted_run_ends_like_one_that_was_not(
    finished: Finished, shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    whole, result = finished
    task = make_task(shards, tiny_model, tmp_path / "out")
    task = replace(task, checkpoints=CheckpointConfig(asynchronous=False))
    with pytest.raises(ConnectionError):
        SupervisedLoop(replace(task, objective=_FailingObjective(shards, "corpus"))).run()
    assert read_lines(task.output / METRICS_FILE)[-1]["step"] == 20
    assert len(list_checkpoints(task.output / CHECKPOINTS)) == 2
    again = SupervisedLoop(task).run()
    assert again["tokens"] == result["tokens"]
    ours, theirs = (load_file(t.output / "model" / "model.safetensors") for t in (task, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    timeless = ("step", "loss", "lr", "grad_norm", "validation_loss")
    for file in (METRICS_FILE, SAMPLES_FILE):
        recorded = [
            [{k: row[k] for k in (*timeless, "prompt", "text") if k in row} for row in rows]
            for rows in (read_lines(task.output / file), read_lines(whole.output / file))
        ]
        assert recorded[0] == recorded[1]


def test_metrics_are_whole_when_a_rewind_is_killed(tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    file.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 9)))
    before = file.read_text()
    child = os.fork()
    if child == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        _rewind(file, 5)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert file.read_text() == before
    _rewind(file, 5)
    assert [row["step"] for row in read_lines(file)] == [1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_others_see_life_while_the_first_rank_writes_samples(
    shards: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, counts = Sampler.complete, []
    pulse = Pulse(tmp_path / "pulse", 0)

    def complete_slowly(self: Sampler, prompt: Sequence[int], *rest: Any) -> str:
        counts.append(pulse._mark.count)
        time.sleep(0.2)
        return complete(self, prompt, *rest)

    monkeypatch.setattr(Sampler, "complete", complete_slowly)
    task = replace(make_task(shards, tiny_model, tmp_path / "out"), steps=1)
    SupervisedLoop(task, pulse).run()
    pulse.stop()
    assert counts[1] - counts[0] >= 3


def test_a_damaged_checkpoint_is_put_aside_and_recorded(
    finished: Finished, shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    whole, _ = finished
    task = make_task(shards, tiny_model, tmp_path / "out")
    SupervisedLoop(task).run()
    [older, newest] = list_checkpoints(task.output / CHECKPOINTS)
    state = newest / "state" / "rank-00000.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    SupervisedLoop(task).run()
    events = read_lines(task.output / EVENTS_FILE)
    assert [row["step"] for row in events if row["what"] == "started"] == [0, 16]
    [corrupt] = [row for row in events if row["what"] == "checkpoint_corrupt"]
    assert corrupt["checkpoint"] == "step-00000024" and older.name == "step-00000016"
    ours, theirs = (load_file(t.output / "model" / "model.safetensors") for t in (task, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_seed_fixes_the_first_loss_to_the_bit(
    finished: Finished, shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    first = read_lines(finished[0].output / METRICS_FILE)[0]["loss"]
    task = replace(make_task(shards, tiny_model, tmp_path / "a"), steps=1, prompts=())
    SupervisedLoop(task).run()
    assert read_lines(task.output / METRICS_FILE)[0]["loss"] == first
    for number, change in enumerate(({"model": ModelPlan(CONFIG, seed=9)}, {"seed": 9})):
        other = replace(task, output=tmp_path / str(number), **change)
        SupervisedLoop(other).run()
        assert read_lines(other.output / METRICS_FILE)[0]["loss"] != first


def test_a_gradient_that_is_no_number_stops_the_run_and_shows_the_batch(
    shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    broken = initialise(CONFIG, 0)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    save_model(broken, CONFIG, load_tokenizer(tiny_model), tmp_path / "broken")
    task = make_task(shards, tiny_model, tmp_path / "out")
    with pytest.raises(UserError, match=r"nan at step 1, and no rank .* lower pretrain.optimizer"):
        SupervisedLoop(replace(task, model=ModelPlan(tmp_path / "broken", seed=1))).run()
    kept = tmp_path / "diverged/pretrain-step-00000001"
    rows = np.load(kept / "rows.npz")
    assert rows["tokens"].shape == (6, 16) and len(rows["index"]) == 6
    lines = read_lines(kept / "rows.jsonl")
    assert [row["row"] for row in lines] == rows["index"].tolist()
    assert [row["source_rows"] for row in lines] == [[]] * 6


def test_a_diverged_batch_names_lines_of_the_users_file(tiny_model: Path, tmp_path: Path) -> None:
    conversations = [
        Conversation(np.full(4, 5, np.int32), np.ones(4, bool), row) for row in range(1, 13)
    ]
    write_demonstrations(conversations, 16, 0, tmp_path, "train")
    rows = DemonstrationRows(tmp_path, "train")
    indices = np.array([2, 0])
    tokenizer = load_tokenizer(tiny_model)
    keep_rows(tmp_path / "kept", indices, rows.read(indices), rows, tokenizer)
    lines = read_lines(tmp_path / "kept" / "rows.jsonl")
    assert [line["row"] for line in lines] == [2, 0]
    assert all(len(set(line["source_rows"])) == 4 for line in lines)
    assert not set(lines[0]["source_rows"]) & set(lines[1]["source_rows"])
