"""How sure a measured number is."""

from __future__ import annotations

import math
from collections.abc import Sequence


def measure_mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error (None for fewer than two values)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    spread = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(spread / (n - 1) / n)


def measure_ratio(rows: Sequence[tuple[float, float]]) -> tuple[float, float | None]:
    """sum(total) / sum(weight) over documents, and its standard error by the delta method.

    Bits per byte and perplexities are such ratios: long documents weigh more, so the error comes
    from each document's residual against the ratio, not from the spread of its own quotient.
    """
    n = len(rows)
    weight = math.fsum(w for _, w in rows)
    ratio = math.fsum(total for total, _ in rows) / weight
    if n < 2:
        return ratio, None
    spread = math.fsum((total - ratio * w) ** 2 for total, w in rows)
    return ratio, math.sqrt(spread / (n - 1) * n) / weight
