"""The learning rate of a step: a pure function of plain numbers."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    steps: int,
    peak: float,
    *,
    shape: Literal["constant", "linear", "cosine", "wsd"],
    warmup_steps: int | None,
    final_ratio: float,
    decay_share: float,
) -> float:
    """Learning rate of optimizer step `step` (0-based) of `steps`.

    Warm-up rises linearly and reaches `peak` at step `warmup_steps` (the first step already moves:
    its rate is peak / (warmup_steps + 1)); it takes 20 steps, or a tenth of all where that is less,
    when `warmup_steps` is None. After it, `linear` and `cosine` (Loshchilov and Hutter,
    2017) fall to `final_ratio` x peak at the last step; `wsd` (warm-up, stable, decay; Hu et al.,
    2024) stays at the peak and falls linearly to it over the last `decay_share` of the steps;
    `constant` stays.
    """
    if warmup_steps is None:
        warmup_steps = min(20, steps // 10)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if shape == "constant":
        return peak
    start = warmup_steps
    if shape == "wsd":
        start = max(warmup_steps, steps - 1 - round(decay_share * steps))
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
    if shape == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif shape in ("linear", "wsd"):
        remaining = 1.0 - progress
    else:
        raise ValueError(f"shape must be constant, linear, cosine or wsd, not {shape!r}")
    return peak * (final_ratio + (1.0 - final_ratio) * remaining)
