"""Which completions of a prompt make a pair: a better and a worse one."""

from __future__ import annotations

from collections.abc import Sequence


def choose_pairs(
    rewards: Sequence[float], texts: Sequence[str], count: int, least_gap: float
) -> list[tuple[int, int]]:
    """At most `count` pairs (better, worse) of completions: the best with the worst, the next best
    with the next worst, as long as their rewards differ by more than `least_gap`.

    Of completions with the same text only the first is used, and each is in one pair.
    """
    seen: dict[str, int] = {}
    for index, text in enumerate(texts):
        seen.setdefault(text, index)
    order = sorted(seen.values(), key=lambda index: (-rewards[index], index))
    pairs: list[tuple[int, int]] = []
    for better, worse in zip(order, reversed(order), strict=True):
        gap = rewards[better] - rewards[worse]
        if len(pairs) == count or gap <= least_gap:
            break
        pairs.append((better, worse))
    return pairs
