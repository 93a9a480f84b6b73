"""Estimators of KL(policy || reference) from the log-probabilities of tokens the policy sampled.

With r = reference / policy at the sampled token (Schulman 2020, joschu.net/blog/kl-approx.html):
all three are functions of log r alone, k1 and k3 are unbiased, k2 and k3 never negative. As a
*loss*, the gradient of k2 is that of KL(policy || reference), while the gradient of k3, which
DeepSeekMath (arXiv:2402.03300, eq. 4) chose, is that of KL(reference || policy): both pull towards
the reference and agree near it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Estimator = Callable[[Tensor, Tensor], Tensor]

# e^20 is far beyond any ratio that means something, and far below what overflows float32.
MAX_LOG_RATIO = 20.0


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
