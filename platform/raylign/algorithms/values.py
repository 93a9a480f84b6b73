"""The value function's loss, and how much of the returns it explains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raylign.algorithms.masked import masked_sum
from raylign.algorithms.policy import Metrics

# What rounding leaves of the variance of float32 numbers that are all the same, over their square.
_LEAST_SPREAD = 1e-13


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None
) -> tuple[Tensor, Metrics]:
    """Half the squared error, weighted and summed; with `clip` the larger of that and the error of
    the value held within `clip` of `old_values` (PPO2; "Implementation matters", arXiv:2005.12729,
    section 3): an update gains nothing by moving a value further.

    Args, [B, T] each: values with gradient; old_values and returns, constants; weights, see
    `weighting`: positive on trained tokens, elsewhere anything may stand in the others.
    Metrics are sums over trained tokens with their count, for any split; `explained_variance` reads
    those of the whole batch. `value/loss` has the sum of the weights as its count.
    """
    active = weights > 0
    values = torch.where(active, values, 0.0)
    old = torch.where(active, old_values, 0.0).detach()
    target = torch.where(active, returns, 0.0).detach()
    errors = (values - target).square()
    clipped = torch.zeros_like(active)
    if clip is not None:
        held = (old + (values - old).clamp(-clip, clip) - target).square()
        clipped = held > errors
        errors = torch.maximum(errors, held)
    loss = 0.5 * (weights.detach() * errors).sum()
    gap = (target - values).detach().double()
    measured = {
        "value/mean": values.detach().double(),
        "value/clip_fraction": clipped.double(),
        "value/error": gap,
        "value/error_square": gap.square(),
        "value/return": target.double(),
        "value/return_square": target.double().square(),
    }
    count = active.sum().double()
    metrics = {name: (masked_sum(value, active), count) for name, value in measured.items()}
    return loss, metrics | {"value/loss": (loss.detach(), weights.sum())}


def explained_variance(means: Mapping[str, float]) -> float:
    """1 - Var(returns - values) / Var(returns), from the means of `value_loss`'s metrics over a
    whole batch: 1 is perfect, 0 no better than a constant, negative worse; 0 where returns do not
    vary."""
    spread = means["value/return_square"] - means["value/return"] ** 2
    left = means["value/error_square"] - means["value/error"] ** 2
    return 1.0 - left / spread if spread > _LEAST_SPREAD * means["value/return_square"] else 0.0
