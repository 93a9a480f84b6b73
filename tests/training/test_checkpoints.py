"""Checkpoints are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylign.training.checkpoints import STATE, CheckpointStore


def make_store(root: Path, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(root, rank=0, barrier=lambda: None, keep=keep)


def write_weights(text: str):
    def write(directory: Path) -> None:
        (directory / "inner").mkdir()
        (directory / "inner" / "weights").write_text(text)

    return write


def test_the_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert store.latest() is None
    for step in (5, 10, 100):
        store.save(step, write_weights(f"{step}"), {"tokens": step})
    found = store.latest()
    assert found is not None
    directory, step, progress = found
    assert (step, progress) == (100, {"tokens": 100})
    assert (directory / "inner" / "weights").read_text() == "100"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def test_an_interrupted_one_is_not_seen_and_is_overwritten(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.save(1, write_weights("one"), {})

    def fail(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        store.save(2, fail, {})
    found = store.latest()
    assert found is not None and found[1] == 1
    store.save(2, write_weights("two"), {})
    found = store.latest()
    assert found is not None and found[1] == 2
    assert not (found[0] / "half").exists()


@pytest.mark.parametrize("damage", ["truncate", "delete", "state"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    store = make_store(tmp_path)
    store.save(1, write_weights("one"), {})
    store.save(2, write_weights("two"), {})
    newest = tmp_path / "step-00000002"
    if damage == "truncate":
        (newest / "inner" / "weights").write_text("t")
    elif damage == "delete":
        (newest / "inner" / "weights").unlink()
    else:
        (newest / STATE).write_text("{")
    found = store.latest()
    assert found is not None and found[1] == 1


def test_only_the_first_rank_moves_directories(tmp_path: Path) -> None:
    """The second rank writes into the directory that the first made, and renames nothing."""
    (tmp_path / ".step-00000003.partial").mkdir()
    waits = []
    second = CheckpointStore(tmp_path, rank=1, barrier=lambda: waits.append(1))
    second.save(3, write_weights("mine"), {})
    assert len(waits) == 2 and second.latest() is None
    assert (tmp_path / ".step-00000003.partial" / "inner" / "weights").read_text() == "mine"
