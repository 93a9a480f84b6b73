"""Dealing variable-length rows over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

from raylign.records import split_by_tokens


def plan_micro_batches(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Rows for every rank, as micro-batches of at most `budget` padded tokens.

    Longest rows are dealt first, each to the rank with the fewest tokens so far. All ranks get the
    same number of micro-batches (collectives need that): the missing ones are empty. Every row
    appears exactly once.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        hands[rank].append(row)
        load[rank] += lengths[row]
    plans = [
        [[hand[i] for i in group] for group in split_by_tokens([lengths[i] for i in hand], budget)]
        for hand in hands
    ]
    most = max(len(plan) for plan in plans)
    return [plan + [[]] * (most - len(plan)) for plan in plans]
