"""What micro-batches measure: named totals and counts, added up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

Sums = dict[str, torch.Tensor]
"""Name to float64 [2], a total and a count."""
LossFunction = Callable[[PreTrainedModel, torch.Tensor, Any], tuple[torch.Tensor, Sums]]
"""(model, hidden states, micro-batch) to its share of the loss, and what it measured."""
Measurement = Callable[[PreTrainedModel, torch.Tensor, Any], Sums]
"""The same without a loss."""


def tally(total: torch.Tensor, count: torch.Tensor | float) -> torch.Tensor:
    """float64 [2] of a total and a count, outside the graph."""
    total = total.detach().double()
    return torch.stack([total, torch.as_tensor(count, dtype=total.dtype, device=total.device)])


def add(found: Sums, more: Sums) -> None:
    """Add sums of the same name, in place."""
    for name, value in more.items():
        found[name] = found[name] + value if name in found else value
