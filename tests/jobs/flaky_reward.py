"""A user's reward function that misbehaves in every way it can."""

from __future__ import annotations


def score(completion: str, reference: str) -> dict[str, float]:
    """Raises for some completions, gives NaN for others, else the share of right characters."""
    choice = sum(map(ord, completion)) % 4
    if choice == 0:
        return {"correct": 1 / 0}
    if choice == 1:
        return {"correct": float("nan")}
    return {"correct": len(set(completion) & set(reference)) / max(1, len(reference))}
