"""Ranges of 64-bit keys, one for each task of a pass that groups."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

KEYS_A_TASK = 8 << 20
"""Keys that one task groups: about 50 bytes each while it does."""


def cut_keys(total: int) -> list[dict[str, int]]:
    """Rows of `number`, `start` and `stop`: equal ranges of about `KEYS_A_TASK` of `total` keys."""
    count = max(1, -(-total // KEYS_A_TASK))
    bounds = [(1 << 64) * n // count for n in range(count + 1)]
    return [
        {"number": n, "start": start, "stop": stop}
        for n, (start, stop) in enumerate(pairwise(bounds))
    ]


def find_range(keys: np.ndarray, start: int, stop: int) -> slice:
    """Where the keys in [start, stop) stand in sorted `keys` (uint64); `stop` may be 2**64."""
    low = int(np.searchsorted(keys, np.uint64(start)))
    high = len(keys) if stop >= 1 << 64 else int(np.searchsorted(keys, np.uint64(stop)))
    return slice(low, high)


def save(directory: Path, name: str, array: np.ndarray) -> str:
    """Write an array so that it appears whole; returns its name."""
    temporary = directory / f".{name}"
    with temporary.open("wb") as stream:
        np.save(stream, np.ascontiguousarray(array))
    temporary.replace(directory / name)
    return name
