"""Documents without some of their lines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A document without the lines that hold evaluation items."""

    text: str
    removed: tuple[str, ...]


def cut_lines(text: str, starts: np.ndarray, ends: np.ndarray) -> Cleaned:
    """`text` without the lines that any byte span [start, end) touches."""
    lines = text.encode().split(b"\n")
    sizes = np.array([len(line) for line in lines])
    firsts = np.cumsum(sizes + 1) - sizes - 1
    opened = np.searchsorted(firsts + sizes, np.maximum(starts, 0), side="right")
    closed = np.searchsorted(firsts, ends - 1, side="right")
    steps = np.zeros(len(lines) + 1, np.int64)
    np.add.at(steps, opened, 1)
    np.add.at(steps, closed, -1)
    doomed = np.cumsum(steps[:-1]) > 0
    kept = [line.decode() for line, gone in zip(lines, doomed, strict=True) if not gone]
    removed = tuple(line.decode() for line, gone in zip(lines, doomed, strict=True) if gone)
    return Cleaned("\n".join(kept).strip("\n"), removed)
