"""Correction of samples drawn by another policy than the one that learns.

What lies between *old* (the learner's policy before its update) and *behaviour* (what the rollout
engine reported) is staleness, and two implementations of one model that do not quite agree. Each
token's surrogate is multiplied by w(old / behaviour), a constant of the gradient:

| mode       | w(r)                           | source                                            |
|------------|--------------------------------|---------------------------------------------------|
| `truncate` | min(r, cap)                    | Ionides 2008; TIS of Yao et al. 2025, "Your       |
|            |                                | efficient RL framework secretly brings you        |
|            |                                | off-policy RL training"                           |
| `mask`     | r in [floor, cap], 0 elsewhere | IcePop of Ling Team, arXiv:2510.18855; MIS of Liu |
|            |                                | et al. 2025, "When speed kills stability"          |
| `none`     | 1                              |                                                   |

and r is the ratio of the token, of its sequence (the product of its tokens' ratios: unbiased, and
of a variance that grows exponentially with length), or the geometric mean over its sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raylign.algorithms.masked import divide, sequence_sums

Level = Literal["token", "sequence", "geometric"]


@dataclass(frozen=True, slots=True)
class Importance:
    """How old / behaviour is corrected. Raises `ValueError` for bounds that cannot be."""

    mode: Literal["truncate", "mask", "none"] = "truncate"
    level: Level = "token"
    cap: float = 2.0
    """Upper bound of the ratio."""
    floor: float = 0.0
    """`mask`: lower bound of the ratio."""

    def __post_init__(self) -> None:
        if not 0 <= self.floor < self.cap < math.inf:
            raise ValueError(f"floor={self.floor} and cap={self.cap}: give 0 <= floor < cap")
        if self.floor and self.mode != "mask":
            raise ValueError(f"floor={self.floor} has no effect with mode={self.mode}")


def correct_importance(
    log_ratio: Tensor, active: Tensor, importance: Importance
) -> tuple[Tensor, Tensor]:
    """(weight, hit) [B, T] of log(old / behaviour) [B, T].

    active: bool [B, T], the trained tokens; elsewhere `log_ratio` may hold anything, weight is 0
    and hit is False. hit: bool, where a bound was exceeded. No gradient; nothing overflows.
    """
    if importance.mode == "none":
        return active.to(log_ratio.dtype), torch.zeros_like(active)
    logs = combine_ratios(log_ratio.detach(), active, importance.level)
    upper = math.log(importance.cap)
    hit = logs > upper
    weight = logs.clamp(max=upper).exp()
    if importance.mode == "mask":
        lower = math.log(importance.floor) if importance.floor else -math.inf
        hit = hit | (logs < lower)
        weight = torch.where(hit, 0.0, weight)
    return torch.where(active, weight, 0.0), hit & active


def combine_ratios(log_ratio: Tensor, active: Tensor, level: Level) -> Tensor:
    """Log-ratios [B, T] under `active`, 0 elsewhere, each replaced by its sequence's sum
    (`sequence`) or mean (`geometric`), repeated along it."""
    if level == "token":
        return torch.where(active, log_ratio, 0.0)
    total = sequence_sums(log_ratio, active)
    if level == "geometric":
        total = divide(total, active.sum(dim=1))
    return torch.where(active, total[:, None], 0.0)
