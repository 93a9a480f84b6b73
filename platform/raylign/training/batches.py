"""What a learner was given at a step, on disk: whatever dies, the step can be taken again.

One safetensors file a batch: the trajectories' arrays end to end, and the rest as JSON. Numbers
come back as they were, to the bit.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from raylign.records import Trajectory
from raylign.training.checkpoints import sync

_ARRAYS = ("token_ids", "loss_mask", "logprobs", "versions")
_NAME = re.compile(r"step-(\d{8})\.safetensors")


@dataclass(frozen=True, slots=True, eq=False)
class LearnerBatch:
    """The samples of one step, and what else its update is a function of."""

    step: int
    trajectories: tuple[Trajectory, ...]
    groups: tuple[int, ...]
    """Group number of each trajectory."""
    settings: Mapping[str, float]
    """Learning rates, coefficients: numbers that hold for this step."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What the controller wants back with it, such as what it dropped; JSON."""


class BatchFiles:
    """The batches of a run that no checkpoint covers yet."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, batch: LearnerBatch) -> None:
        """Keep a batch; once this returns it outlives the machine's power. Raises `OSError`."""
        self._directory.mkdir(parents=True, exist_ok=True)
        write_batch(self._directory / f"step-{batch.step:08d}.safetensors", batch)

    def read_from(self, step: int) -> list[LearnerBatch]:
        """The unbroken run of batches from `step` on; those behind a gap, or behind one that is
        damaged, cannot be used and are removed."""
        found: list[LearnerBatch] = []
        broken = False
        for number, file in self._list():
            if number < step:
                continue
            batch = None if broken or number != step + len(found) else read_batch(file)
            if batch is None:
                broken = True
                file.unlink()
            else:
                found.append(batch)
        return found

    def remove_below(self, step: int) -> None:
        """Forget batches that a checkpoint of `step` covers."""
        for number, file in self._list():
            if number < step:
                file.unlink()

    def remove_from(self, step: int) -> None:
        """Forget `step` and all after it: they are to be made otherwise."""
        for number, file in self._list():
            if number >= step:
                file.unlink()

    def _list(self) -> list[tuple[int, Path]]:
        files = self._directory.glob("step-*.safetensors")
        found = ((_NAME.fullmatch(file.name), file) for file in files)
        return sorted((int(match[1]), file) for match, file in found if match)


def write_batch(file: Path, batch: LearnerBatch, flush: bool = True) -> None:
    """Write a batch so that a reader sees it whole or not at all; with `flush` it is on disk when
    this returns. Raises `OSError`."""
    temporary = file.with_name(f".{file.name}")
    arrays = _concatenate(batch.trajectories)
    body = {
        "step": batch.step,
        "groups": list(batch.groups),
        "settings": dict(batch.settings),
        "record": dict(batch.record),
        "trajectories": [_describe(t) for t in batch.trajectories],
    }
    text = json.dumps(body)
    save_file(arrays, temporary, metadata={"batch": text, "sum": _sum(text, arrays)})
    if flush:
        sync(temporary)
    os.replace(temporary, file)
    if flush:
        sync(file.parent)


def read_batch(file: Path) -> LearnerBatch | None:
    """The batch in a file, or None when it is not what was written."""
    try:
        with safe_open(file, "numpy") as stream:
            text, expected = stream.metadata()["batch"], stream.metadata()["sum"]
            arrays = {name: stream.get_tensor(name) for name in (*_ARRAYS, "lengths")}
        if _sum(text, arrays) != expected:
            return None
        body = json.loads(text)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
    ends = np.cumsum(arrays["lengths"])
    trajectories: list[Trajectory] = []
    for row, end in zip(body["trajectories"], ends, strict=True):
        start = end - arrays["lengths"][len(trajectories)]
        parts = {name: arrays[name][start:end] for name in _ARRAYS}
        trajectories.append(Trajectory(**row, **parts))
    return LearnerBatch(
        step=body["step"],
        trajectories=tuple(trajectories),
        groups=tuple(body["groups"]),
        settings=body["settings"],
        record=body["record"],
    )


def _concatenate(trajectories: Sequence[Trajectory]) -> dict[str, np.ndarray]:
    types = {"loss_mask": np.bool_, "logprobs": np.float32}
    arrays = {
        name: np.concatenate(  # with an empty one first: there may be no trajectory
            [np.zeros(0, types.get(name, np.int32)), *(getattr(t, name) for t in trajectories)]
        )
        for name in _ARRAYS
    }
    return arrays | {"lengths": np.array([len(t.token_ids) for t in trajectories], np.int64)}


def _sum(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    found = xxhash.xxh3_128(text.encode())
    for name in (*_ARRAYS, "lengths"):
        found.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return found.hexdigest()


def _describe(trajectory: Trajectory) -> dict[str, Any]:
    slots = (name for name in Trajectory.__slots__ if name not in _ARRAYS)
    return {name: getattr(trajectory, name) for name in slots}
