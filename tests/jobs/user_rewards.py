"""A user's reward functions, named by import path: sound ones, and one that misbehaves."""

from __future__ import annotations

import os
import time
from pathlib import Path


def reward_variety(completion: str, reference: str) -> dict[str, float]:
    """The more different characters the better: even untrained models differ in it."""
    return {"correct": len(set(completion)) / 40}


def misbehave(completion: str, reference: str) -> dict[str, float]:
    """Raises for some completions, gives NaN for others, else the share of right characters."""
    choice = sum(map(ord, completion)) % 4
    if choice == 0:
        return {"correct": 1 / 0}
    if choice == 1:
        return {"correct": float("nan")}
    return {"correct": len(set(completion) & set(reference)) / max(1, len(reference))}


def reward_when_let(completion: str, reference: str) -> dict[str, float]:
    """The same for words, and as slow as somebody wants: while a file is there, it waits."""
    while Path(os.environ["RAYLIGN_TEST_HOLD"]).exists():
        time.sleep(0.05)
    return {"correct": len(set(completion.split())) / 16}
