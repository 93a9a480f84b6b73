"""Sums and means under a mask, with the denominator as an argument.

Entries outside the mask may hold anything, NaN included: they reach neither value nor gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` [...] where `mask` (bool, same shape) is True; a 0-d tensor."""
    return torch.where(mask, values, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor, denominator: Tensor | float) -> Tensor:
    """`masked_sum` over a `denominator` counted by the caller, who knows all ranks and
    micro-batches; 0 when the denominator is 0."""
    return divide(masked_sum(values, mask), denominator)


def sequence_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Per-sequence sums [B] of `values` [B, T] under `mask` [B, T]."""
    return torch.where(mask, values, 0.0).sum(dim=1)


def divide(total: Tensor, count: Tensor | float) -> Tensor:
    """total / count, and 0 (not NaN) where nothing was counted."""
    count = torch.as_tensor(count, dtype=total.dtype, device=total.device)
    return torch.where(count == 0, 0.0, total / torch.where(count == 0, 1.0, count))
