"""Estimators of KL(policy || reference) from the log-probabilities of tokens the policy sampled.

With r = reference / policy at the sampled token (Schulman 2020, joschu.net/blog/kl-approx.html):
all three are functions of log r alone, k1 and k3 are unbiased, k2 and k3 never negative.

Taken off a *reward* the estimate is a constant, and the policy gradient makes of k1 an unbiased
gradient of KL(policy || reference); k2 and k3 are there biased.

In a *loss* the gradient goes straight through the estimate, and what it is in expectation differs
(its mean over samples forgets that the policy decides what is sampled):

| in a loss | expected gradient                                                                    |
|-----------|--------------------------------------------------------------------------------------|
| k1        | that of E[log p], which is 0: nothing but noise pulls, whatever the coefficient      |
| k2        | that of KL(policy || reference)                                                      |
| k3        | that of KL(reference || policy), chosen by DeepSeekMath (arXiv:2402.03300, eq. 4)    |

The last two pull towards the reference and agree near it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Estimator = Callable[[Tensor, Tensor], Tensor]

# e^20 is far beyond any ratio that means something, and far below what overflows float32.
MAX_LOG_RATIO = 20.0

# The relative error is cut off here, so that one odd batch moves the coefficient little.
_MAX_ERROR = 0.2


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """-log r per token: unbiased, of either sign, noisy."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(log r)^2 / 2 per token: biased, low variance."""
    return (logprobs - reference_logprobs).square() / 2


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """r - 1 - log r per token: unbiased, never negative; log r is cut at `MAX_LOG_RATIO`."""
    log_ratio = (reference_logprobs - logprobs).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


ESTIMATORS: dict[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3}


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """A coefficient that brings the KL to a target (Ziegler et al. 2019, arXiv:1909.08593, section
    2.2): proportional control of its logarithm. Raises `ValueError` for numbers not above 0."""

    coef: float
    target: float
    """In the unit of what `update` is given: nats a token, or a sequence."""
    horizon: float
    """Samples over which the coefficient grows by at most a fifth."""

    def __post_init__(self) -> None:
        for name in ("coef", "target", "horizon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")

    def update(self, kl_mean: float, samples: int) -> float:
        """The next coefficient, after `samples` sequences with a mean KL of `kl_mean`.

        coef * (1 + clip(kl_mean / target - 1, -0.2, 0.2) * samples / horizon). Never 0 or less: a
        batch of more than a few horizons would turn its sign, so it counts as one horizon. Raises
        `ValueError` for a `kl_mean` that is not finite.
        """
        if not math.isfinite(kl_mean):
            raise ValueError(f"kl_mean={kl_mean} is no mean KL")
        error = min(max(kl_mean / self.target - 1, -_MAX_ERROR), _MAX_ERROR)
        return self.coef * (1 + error * min(samples / self.horizon, 1.0))
