"""Layers shared out over the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from raylign.config import UserError


def divide(costs: Sequence[int], parts: int) -> tuple[int, ...]:
    """Bounds [parts + 1] of consecutive, non-empty parts whose most expensive one is as cheap as it
    can be.

    Raises `UserError` when there are more parts than costs.
    """
    if parts > len(costs):
        raise UserError(
            f"engine.pipeline_parallel: {parts} stages cannot share {len(costs)} layers; lower it"
        )
    ends = [0]
    for cost in costs:
        ends.append(ends[-1] + cost)
    # best[n]: (most expensive part, bounds) of the first n costs in so many parts.
    best: dict[int, tuple[int, tuple[int, ...]]] = {
        n: (ends[n], (0, n)) for n in range(1, len(costs) + 1)
    }
    for part in range(2, parts + 1):
        best = {
            n: min(
                (max(best[m][0], ends[n] - ends[m]), (*best[m][1], n)) for m in range(part - 1, n)
            )
            for n in range(part, len(costs) + 1)
        }
    return best[len(costs)][1]
