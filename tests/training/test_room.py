"""Disk space: what is counted, what is refused, and what is said when none is left."""

from __future__ import annotations

import errno
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import SafetensorError

sys.path.insert(0, str(Path(__file__).parent))

from test_loop import make_task, shards  # noqa: F401

from raylign.config import AdapterConfig, SftConfig, UserError, WorkersConfig
from raylign.models.assembly import ModelPlan
from raylign.models.budget import count
from raylign.models.loading import load_model, load_tokenizer
from raylign.tracking import EVENTS_FILE, read_lines
from raylign.training import loop, supervised
from raylign.training.continuation import outline
from raylign.training.loop import SupervisedLoop, SupervisedTask
from raylign.training.outlook import Outlook, RowPlan
from raylign.training.room import Demand, explain_full, is_out_of_room, require_room

GIB = 2**30
SAFETENSORS = "Error while serializing: I/O error: {} (os error {})"


def fill(root: Path, name: str, size: int) -> None:
    (root / name).mkdir(parents=True)
    with (root / name / "state").open("wb") as stream:
        stream.truncate(size)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of checkpoints, on a disk with 10 GiB free."""
    usage = shutil._ntuple_diskusage(100 * GIB, 90 * GIB, 10 * GIB)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    return tmp_path / ".checkpoints"


def test_a_disk_that_is_too_small_is_refused_before_training(root: Path) -> None:
    require_room(root, Demand(2 * GIB, 4 * GIB, saves=9, keep=2), "sft")  # three and the end
    with pytest.raises(UserError) as caught:
        require_room(root, Demand(2 * GIB, 5 * GIB, saves=9, keep=2), "sft")
    text = str(caught.value).replace(str(root.parent), "there")
    assert text.startswith(
        "sft needs 11.0 GiB in there (3 checkpoints of 2.0 GiB and 5.0 GiB at the end) and the "
        "disk has 10.0 GiB free; free some, lower sft.checkpoints.keep"
    )
    assert "\n" not in text
    require_room(root, Demand(2 * GIB, 10 * GIB, saves=0, keep=2), "sft")


def test_what_is_there_is_not_needed_again_but_damaged_ones_stay(root: Path) -> None:
    demand = Demand(2 * GIB, 5 * GIB, saves=9, keep=2)
    fill(root, "step-00000004", 2 * GIB)
    require_room(root, demand, "sft")
    (root / "step-00000004").rename(root / "corrupt-step-00000004")
    with pytest.raises(UserError, match=r"needs 11.0 GiB"):
        require_room(root, demand, "sft")


def test_a_full_disk_is_explained_in_a_line(root: Path) -> None:
    known = Demand(2 * GIB, 5 * GIB, saves=9, keep=2)
    text = explain_full("sft", root)
    assert text.endswith("; no checkpoint is kept; free some and run again")
    fill(root, "step-00000004", 10)
    text = explain_full("sft", root, known)
    assert text == (
        f"sft: no space left in {root.parent}; the newest checkpoint, step-00000004, is kept; free "
        "1024.0 MiB more and run again"
    )


def test_a_full_disk_is_recognised_whoever_says_so() -> None:
    with pytest.raises(OSError) as failed, open("/dev/full", "ab") as stream:
        np.save(stream, np.zeros(10**6))
        stream.flush()
    assert is_out_of_room(failed.value)
    assert is_out_of_room(SafetensorError(SAFETENSORS.format("No space left on device", 28)))
    assert is_out_of_room(SafetensorError(SAFETENSORS.format("Disk quota exceeded", 122)))
    assert not is_out_of_room(SafetensorError(SAFETENSORS.format("Permission denied", 13)))
    assert not is_out_of_room(OSError(errno.EIO, "Input/output error"))


@pytest.mark.parametrize(
    ("kind", "head"), [("none", "language"), ("lora", "score"), ("qlora", "language")]
)
def test_the_end_is_counted_as_large_as_it_will_be(
    tiny_model: Path,
    tmp_path: Path,
    shards: Path,  # noqa: F811
    kind: str,
    head: str,
) -> None:
    plan = ModelPlan(tiny_model, 1, head, kind, dtype="bfloat16")  # type: ignore[arg-type]
    form = outline(plan.build(), load_tokenizer(tiny_model), {}, "bfloat16")
    size = sum(p.numel() for p in load_model(tiny_model).parameters())
    if head == "score":  # the language head is the embedding
        size += 64
    expected = 2 * size + (form.exported if kind != "none" else 0)
    assert form.final == expected and form.exported == 2 * form.trained


def test_the_plan_counts_the_folded_model() -> None:
    fields = {
        "model_type": "llama",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    }
    blueprint = count(fields, "config.json")
    texts = {}
    for peft in ("none", "qlora", "prompt"):
        config = SftConfig(peft=peft, adapter=AdapterConfig())  # type: ignore[arg-type]
        config = config.model_copy(
            update={"engine": config.engine.model_copy(update={"dtype": "bfloat16"})}
        )
        outlook = Outlook("sft", config, blueprint, RowPlan(1, 512), 10**6)
        texts[peft] = dict(outlook.explain_disk(2 * GIB))["disk"]
    folded = (blueprint.total + 10**6) * 2 / GIB
    assert (
        f"and the result ({folded:.1f} GiB: the adapter, and the model with it folded in)"
        in (texts["qlora"])
    )
    assert "folded" not in texts["none"] and "folded" not in texts["prompt"]
    enough = dict(outlook.explain_disk(100 * GIB))["disk"]
    assert "NOT ENOUGH" not in enough


def test_room_is_asked_for_before_anything_takes_long(
    shards: Path,  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = make_task(shards, tiny_model, tmp_path / "out")
    begun: list[object] = []
    monkeypatch.setattr(type(task.objective), "begin", lambda *given: begun.append(given))
    usage = shutil._ntuple_diskusage(GIB, GIB, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"pretrain needs .* and the disk has 1 KiB free"):
        SupervisedLoop(task).run()
    assert not begun


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray tells a rank where it is; this one is in no group."""
    context = SimpleNamespace(get_world_rank=lambda: 0, get_node_id=lambda: "node")
    monkeypatch.setattr(supervised.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(supervised.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(supervised, "note_reservation", lambda _: None)  # it would look for Ray


def read_refusal(task: SupervisedTask) -> str:
    with pytest.raises(UserError) as caught:
        supervised._raise_failure(task, WorkersConfig(), None)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.usefixtures("rank")
def test_a_disk_that_fills_up_at_the_end_is_told_and_not_tried_again(
    shards: Path,  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = make_task(shards, tiny_model, tmp_path / "out")
    task = replace(task, steps=5, checkpoint_every=4, prompts=())
    exports: list[Path] = []

    def fill_up(engine: object, tokenizer: object, output: Path) -> None:
        exports.append(output)
        (output / "model").mkdir()
        (output / "model" / "half").write_text("half")
        raise SafetensorError(SAFETENSORS.format("No space left on device", 28))

    with monkeypatch.context() as patched:
        patched.setattr(loop, "export_stage", fill_up)
        with pytest.raises(SafetensorError):  # so that the others end, too
            supervised.train_rank(task)
        assert supervised.train_rank(task) is None
    assert exports == [task.output] and not (task.output / "model").exists()
    assert read_refusal(task) == (
        f"pretrain: no space left in {task.output}; the newest checkpoint, step-00000004, is kept; "
        "free some and run again"
    )
    (task.output / supervised._REFUSAL).unlink()
    assert supervised.train_rank(task)
    started = [row for row in read_lines(task.output / EVENTS_FILE) if row["what"] == "started"]
    assert [row["step"] for row in started] == [0, 4] and load_model(task.output / "model")


@pytest.mark.usefixtures("rank")
def test_a_disk_without_a_byte_is_told_of(
    shards: Path,  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = make_task(shards, tiny_model, tmp_path / "out")
    (task.output / EVENTS_FILE).symlink_to("/dev/full")

    def fail(file: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(supervised, "write_json", fail)
    with pytest.raises(OSError, match="No space left"):
        supervised.train_rank(task)
    assert "no checkpoint is kept; free some and run again" in read_refusal(task)


@pytest.mark.usefixtures("rank")
def test_another_failure_is_no_full_disk(
    shards: Path,  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    task = make_task(shards, tiny_model, tmp_path / "out")
    (task.output / EVENTS_FILE).mkdir()
    with pytest.raises(IsADirectoryError):
        supervised.train_rank(task)
    assert not (task.output / supervised._REFUSAL).exists()
