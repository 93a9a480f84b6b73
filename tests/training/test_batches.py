"""Batches on disk come back to the bit, and a damaged one is known as such."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from raylign.records import Trajectory
from raylign.training.batches import BatchFiles, LearnerBatch, read_batch, write_batch


def make_batch(step: int, rows: int = 3) -> LearnerBatch:
    rng = np.random.default_rng(step)
    trajectories = []
    for row in range(rows):
        length = int(rng.integers(2, 9))
        mask = np.arange(length) >= 1
        trajectories.append(
            Trajectory(
                prompt_id=f"p{row}",
                group_id=f"{step}/{row}",
                token_ids=rng.integers(0, 99, length).astype(np.int32),
                loss_mask=mask,
                logprobs=np.where(mask, -rng.random(length), 0.0).astype(np.float32),
                versions=np.where(mask, step, -1).astype(np.int32),
                finish_reason="stop",
                text="ünïcode\u2028",
                reward=float(rng.random()) / 3,
                reward_parts={"correct": 1 / 3},
            )
        )
    settings = {"lr": 1e-3 / 3, "kl_coef": 0.1}
    return LearnerBatch(step, tuple(trajectories), (0, 0, 1), settings, {"dropped": {"empty": 2}})


def same(a: LearnerBatch, b: LearnerBatch) -> bool:
    pairs = zip(a.trajectories, b.trajectories, strict=True)
    for left, right in pairs:
        for field in dataclasses.fields(Trajectory):
            x, y = getattr(left, field.name), getattr(right, field.name)
            if isinstance(x, np.ndarray):
                if x.dtype != y.dtype or not np.array_equal(x, y):
                    return False
            elif x != y:
                return False
    rest = ("step", "groups", "settings", "record")
    return all(getattr(a, name) == getattr(b, name) for name in rest)


def test_a_batch_comes_back_as_it_was(tmp_path: Path) -> None:
    files = BatchFiles(tmp_path / "batches")
    batches = [make_batch(step) for step in range(4, 8)]
    for batch in batches:
        files.write(batch)
    found = files.read_from(5)
    assert [b.step for b in found] == [5, 6, 7]
    assert all(same(a, b) for a, b in zip(batches[1:], found, strict=True))
    assert not same(batches[0], batches[1])


def test_a_batch_without_trajectories_comes_back_too(tmp_path: Path) -> None:
    empty = LearnerBatch(3, (), (), {}, {"rejected": ["reward is nan"]})
    write_batch(tmp_path / "group.safetensors", empty, flush=False)
    found = read_batch(tmp_path / "group.safetensors")
    assert found is not None and same(found, empty)


def test_nothing_behind_a_gap_is_used(tmp_path: Path) -> None:
    files = BatchFiles(tmp_path)
    for step in (2, 3, 5):
        files.write(make_batch(step))
    assert [b.step for b in files.read_from(2)] == [2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000002.safetensors",
        "step-00000003.safetensors",
    ]
    files.remove_below(3)
    assert [b.step for b in files.read_from(3)] == [3]
    files.remove_from(3)
    assert files.read_from(3) == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", [0.3, 0.9, 1.0])
def test_damage_is_known(tmp_path: Path, part: float) -> None:
    files = BatchFiles(tmp_path)
    files.write(make_batch(0))
    file = tmp_path / "step-00000000.safetensors"
    whole = bytearray(file.read_bytes())
    if part == 1.0:
        whole[-3] ^= 1  # one bit of one number
        file.write_bytes(whole)
    else:
        file.write_bytes(whole[: int(len(whole) * part)])
    assert read_batch(file) is None
    assert files.read_from(0) == []
