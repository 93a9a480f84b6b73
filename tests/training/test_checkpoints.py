"""Checkpoints are whole or absent, and the last good one stays whatever happens."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from raylign.config import UserError
from raylign.training.checkpoints import (
    EXPORT,
    LATEST,
    MANIFEST,
    STATE,
    Checkpoint,
    DamageError,
    Event,
    clear_drafts,
    commit,
    find_newest,
    list_checkpoints,
    prune,
    require_same,
    retain,
    verify,
)
from raylign.training.fragments import MASTER, Fragment, Place, StoredState
from raylign.training.saving import Plan, Saver

IDENTITY = {"model": "m" * 64, "tokenizer": "t" * 64, "batch_size": 6, "seed": 1}


def make_fragment(value: float, name: str = "w", size: int = 1000) -> Fragment:
    return Fragment(name, Place((size,)), 0, 1, {MASTER: torch.full((size,), float(value))})


def export(stored: StoredState, directory: Path) -> None:
    directory.mkdir()
    (directory / "model").write_text(f"{float(stored.whole('w')[0])}")


def make_saver(root: Path, rank: int = 0, ranks: int = 1, **changes: object) -> Saver:
    settings = {"keep": 2, "asynchronous": True, "timeout_s": 5.0} | changes
    plan = Plan(root, rank, ranks, "attempt", IDENTITY, **settings)  # type: ignore[arg-type]
    return Saver(plan, export)


def finish(saver: Saver) -> list[Event]:
    until = time.monotonic() + 20
    while saver.busy:
        assert time.monotonic() < until
        time.sleep(0.002)
    return saver.take_events()


def save(saver: Saver, step: int) -> list[Event]:
    saver.save(step, [make_fragment(step)], {"tokens": step})
    return finish(saver)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_the_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    assert find_newest(tmp_path) == (None, [])
    saver = make_saver(tmp_path)
    for step in (5, 10, 100):
        [event] = save(saver, step)
        assert event["what"] == "checkpoint" and event["step"] == step
    assert names(tmp_path) == [LATEST, "step-00000010", "step-00000100"]
    assert (tmp_path / LATEST).read_text() == "step-00000100\n"
    found, events = find_newest(tmp_path)
    assert found is not None and events == []
    path, checkpoint = found
    assert (checkpoint.step, checkpoint.progress) == (100, {"tokens": 100})
    assert checkpoint.identity == IDENTITY
    assert set(checkpoint.files) == {f"{STATE}/rank-00000.safetensors", f"{EXPORT}/model"}
    assert float(StoredState(path / STATE).whole("w")[7]) == 100.0
    assert (path / EXPORT / "model").read_text() == "100.0"


def test_training_goes_on_while_it_is_written(tmp_path: Path) -> None:
    """What is saved is what was there when saving began; without a copy it must be waited for."""
    held = threading.Event()

    def export_late(stored: StoredState, directory: Path) -> None:
        assert held.wait(10)
        export(stored, directory)

    sizes = []
    for asynchronous in (True, False):
        root = tmp_path / str(asynchronous)
        plan = Plan(root, 0, 1, "a", IDENTITY, 2, asynchronous, 5.0)
        saver = Saver(plan, export_late)
        fragment = make_fragment(1.0)
        held.clear()
        saver.save(3, [fragment], {})
        assert saver.busy and saver.writing and saver.take_events() == []
        if asynchronous:
            fragment.tensors[MASTER].fill_(2.0)
        held.set()
        assert [event["what"] for event in finish(saver)] == ["checkpoint"]
        assert not saver.writing
        sizes.append(verify(root / "step-00000003").files)
    assert sizes[0] == sizes[1], "the same bytes"


def damage(path: Path, how: str) -> None:
    state = path / STATE / "rank-00000.safetensors"
    manifest = json.loads((path / MANIFEST).read_text())
    if how == "cut short":
        os.truncate(state, 100)
    elif how == "missing":
        state.unlink()
    elif how == "one bit":
        content = bytearray(state.read_bytes())
        content[-100] ^= 4
        state.write_bytes(content)
    elif how == "no manifest":
        (path / MANIFEST).unlink()
    elif how == "half a manifest":
        (path / MANIFEST).write_text(json.dumps(manifest)[:-40])
    else:
        manifest["step"] += 1
        (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("cut short", "rank-00000.safetensors has 100 of 4,"),
        ("missing", "rank-00000.safetensors is missing"),
        ("one bit", "rank-00000.safetensors has another sha256"),
        ("no manifest", "manifest.json cannot be read (FileNotFoundError)"),
        ("half a manifest", "manifest.json cannot be read (JSONDecodeError)"),
        ("another number", "manifest.json was changed"),
    ],
)
def test_a_damaged_one_is_put_aside_and_the_one_before_is_used(
    tmp_path: Path, how: str, reason: str
) -> None:
    saver = make_saver(tmp_path)
    save(saver, 1)
    save(saver, 2)
    damage(tmp_path / "step-00000002", how)
    found, [event] = find_newest(tmp_path)
    assert found is not None and found[1].step == 1
    assert event["what"] == "checkpoint_corrupt" and event["checkpoint"] == "step-00000002"
    assert reason in event["reason"]
    assert "corrupt-step-00000002" in names(tmp_path)
    save(saver, 2)  # it can be made again, and fail again
    damage(tmp_path / "step-00000002", how)
    found, [event] = find_newest(tmp_path)
    assert found is not None and event["now"] == "corrupt-step-00000002-2"


def test_retention_never_removes_the_last_good_one(tmp_path: Path) -> None:
    saver = make_saver(tmp_path)
    save(saver, 1)
    save(saver, 2)
    damage(tmp_path / "step-00000002", "one bit")
    [event] = prune(tmp_path, 1)
    assert event["what"] == "checkpoint_corrupt"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    damage(tmp_path / "step-00000001", "one bit")
    assert prune(tmp_path, 1) == [], "nothing to remove, nothing to read"


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may become longer than `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_the_old_one_and_training_goes_on(tmp_path: Path) -> None:
    saver = make_saver(tmp_path)
    save(saver, 1)
    with full_disk(2000):
        [event] = save(saver, 2)
    assert event == {
        "what": "checkpoint_failed",
        "step": 2,
        "reason": "File too large",
        "kept": "step-00000001",
    }
    assert names(tmp_path) == [LATEST, "step-00000001"], "no draft is left"
    assert [event["what"] for event in save(saver, 3)] == ["checkpoint"]


def test_a_failing_export_makes_no_checkpoint(tmp_path: Path) -> None:
    def fail(stored: StoredState, directory: Path) -> None:
        raise OSError(28, "No space left on device")

    saver = Saver(Plan(tmp_path, 0, 1, "a", IDENTITY, 2, True, 5.0), fail)
    [event] = save(saver, 1)
    assert event["reason"] == "No space left on device" and event["kept"] is None
    assert names(tmp_path) == []


def test_a_defect_is_not_swallowed(tmp_path: Path) -> None:
    def fail(stored: StoredState, directory: Path) -> None:
        raise ZeroDivisionError("a defect")

    saver = Saver(Plan(tmp_path, 0, 1, "a", IDENTITY, 2, True, 5.0), fail)
    with pytest.raises(ZeroDivisionError):
        save(saver, 1)


def test_all_ranks_parts_make_one_checkpoint(tmp_path: Path) -> None:
    savers = [make_saver(tmp_path, rank, 3) for rank in range(3)]
    for rank in (2, 0, 1):
        fragments = [make_fragment(rank, f"w{'' if rank == 0 else rank}")] if rank < 2 else []
        savers[rank].save(7, fragments, {})
        time.sleep(0.05)
    assert [event["what"] for event in finish(savers[0])] == ["checkpoint"]
    assert finish(savers[1]) == finish(savers[2]) == [], "the first rank tells"
    found = verify(tmp_path / "step-00000007")
    assert found.ranks == 3
    assert sorted(name for name in found.files if name.startswith(STATE)) == [
        f"{STATE}/rank-0000{rank}.safetensors" for rank in (0, 1)
    ]


def test_a_rank_that_fails_or_does_not_come_is_named(tmp_path: Path) -> None:
    first, second = make_saver(tmp_path, 0, 2, timeout_s=0.3), make_saver(tmp_path, 1, 2)
    [event] = save(first, 1)
    assert event["reason"] == "rank-00001 wrote nothing for 0.3 s"
    with full_disk(2000):
        second.save(2, [make_fragment(2.0)], {})
        assert finish(second) == []
    [event] = save(first, 2)
    assert event["reason"] == "rank-00001 could not write: File too large"
    assert list_checkpoints(tmp_path) == []


def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """Die at the n-th call that changes the file system, for every n."""
    survived, stage = set(), 0
    while True:
        root = tmp_path / str(stage)
        root.mkdir()
        for step in (1, 2):
            draft = write_draft(root, step)
            if step == 1:
                commit(draft, root, describe(draft, step))
        child = os.fork()
        if child == 0:
            die_at(stage)
            commit(draft, root, describe(draft, 2))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found, events = find_newest(root)
        assert found is not None and events == []
        survived.add(found[1].step)
        clear_drafts(root)
        for path in list_checkpoints(root):
            verify(path)
        if os.WIFEXITED(status):
            break
        stage += 1
    assert survived == {1, 2} and stage > 8


def write_draft(root: Path, step: int) -> Path:
    draft = root / f".step-{step:08d}.a.partial"
    (draft / STATE).mkdir(parents=True)
    (draft / STATE / "part").write_text(f"state {step}")
    return draft


def describe(draft: Path, step: int) -> Checkpoint:
    import hashlib

    content = (draft / STATE / "part").read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return Checkpoint(step, IDENTITY, {}, 1, {f"{STATE}/part": entry})


def die_at(call: int) -> None:
    """Replace what changes the file system by what kills at the given call."""
    left = [call]

    def wrap(function):  # type: ignore[no-untyped-def]
        def counted(*arguments, **options):  # type: ignore[no-untyped-def]
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments, **options)

        return counted

    for name in ("rename", "replace", "fsync", "open"):
        setattr(os, name, wrap(getattr(os, name)))


def test_a_checkpoint_of_something_else_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    require_same(path, IDENTITY, dict(IDENTITY), "sft")
    for what, value, text in (
        ("model", "x" * 64, "of another model (mmmmmmmmmmmm, not xxxxxxxxxxxx)"),
        ("tokenizer", "x" * 64, "of another tokenizer (tttttttttttt, not xxxxxxxxxxxx)"),
        ("batch_size", 8, "of another batch size (6, not 8)"),
        ("seed", 2, "of another seed (1, not 2)"),
    ):
        with pytest.raises(UserError) as caught:
            require_same(path, IDENTITY, IDENTITY | {what: value}, "sft")
        assert text in str(caught.value) and "\n" not in str(caught.value)
        assert "sft.checkpoints.resume=never" in str(caught.value)


def test_what_stays_when_all_is_done(tmp_path: Path) -> None:
    root, kept = tmp_path / ".checkpoints", tmp_path / "checkpoints"
    saver = make_saver(root)
    save(saver, 1)
    save(saver, 2)
    retain(root, kept, "none")
    assert not kept.exists()
    retain(root, kept, "all")
    assert verify(kept / "step-00000001").step == 1
    retain(root, kept, "models")
    assert sorted(str(f.relative_to(kept)) for f in kept.rglob("*") if f.is_file()) == [
        f"step-0000000{step}/{EXPORT}/model" for step in (1, 2)
    ]
    assert len(list_checkpoints(root)) == 2, "an interruption from here on loses nothing"


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamageError, match="cannot be read"):
        verify(tmp_path / "step-00000001")
