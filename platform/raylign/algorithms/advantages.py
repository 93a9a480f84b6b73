"""From rewards to advantages: one number a sequence, or one a token with a value function.

Rewards must be finite: a sample whose reward is NaN has to be rejected before it gets here, for
then its siblings' statistics are those of the group without it. Finite rewards never give NaN.
Each function wants the whole batch at once, before any split into ranks or micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raylign.algorithms.masked import divide


def group_relative(
    rewards: Tensor, groups: Tensor, *, scale_by_std: bool, eps: float = 1e-6
) -> Tensor:
    """Reward minus the mean of its group, divided by the group's standard deviation if asked.

    DeepSeekMath (arXiv:2402.03300, section 4.1.2) scales; Dr. GRPO (arXiv:2503.20783) does not,
    because scaling favours questions that are almost always or almost never solved. The standard
    deviation is the sample one (n - 1). A group of one sample, or whose rewards are all the same,
    teaches nothing: its advantages are exactly 0.

    Args: rewards [B]; groups int64 [B], any numbering; eps is added to the standard deviation.
    Returns [B]. Raises `ValueError` for a reward that is not finite.
    """
    values, index, count = _group(rewards, groups)
    mean = _sums(values, index, count) / count
    centred = torch.where(_spread(values, index, count)[index] > 0, values - mean[index], 0.0)
    if scale_by_std:
        variance = _sums(centred.square(), index, count) / (count - 1).clamp(min=1)
        centred = divide(centred, (variance.sqrt() + eps)[index])
    return centred.to(rewards.dtype)


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """Reward minus the mean reward of the *other* samples of its group (RLOO, arXiv:2402.14740).

    The baseline of a sample does not contain the sample, so the gradient is unbiased. A group of
    one has nothing to compare with: 0. Arguments, result and errors as `group_relative`.
    """
    values, index, count = _group(rewards, groups)
    total = _sums(values, index, count)
    others = (total[index] - values) / (count[index] - 1).clamp(min=1)
    different = _spread(values, index, count)[index] > 0
    return torch.where(different, values - others, 0.0).to(rewards.dtype)


def keep_rewards(rewards: Tensor, groups: Tensor) -> Tensor:
    """The rewards themselves [B]: no baseline but the batch's mean, which whitening subtracts
    from every token's advantage (REINFORCE++, arXiv:2501.03262). Arguments and errors as
    `group_relative`; groups are ignored."""
    _group(rewards, groups)
    return rewards


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16) over the trained tokens.

    A_t = delta_t + gamma lam A_next, delta_t = r_t + gamma V_next - V_t, where *next* is the next
    token under the mask: prompts and tool output between two sampled tokens are no step of the
    policy. V after the last one is 0.

    Args: rewards [B, T] (only those on trained tokens count); values [B, T], entry t the value of
    the state in which token t was chosen; mask bool [B, T].
    Returns (advantages, returns) [B, T], both 0 outside the mask; returns = advantages + values.
    """
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    following_value = torch.zeros_like(values[:, 0])
    following = torch.zeros_like(following_value)
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following = torch.where(here, delta + gamma * lam * following, following)
        following_value = torch.where(here, values[:, t], following_value)
        advantages[:, t] = torch.where(here, following, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def _group(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards in float64 [B], dense group index [B] and samples of each group [G] (float64)."""
    bad = int((~torch.isfinite(rewards)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {rewards.numel()} rewards are not finite; reject such samples beforehand"
        )
    _, index, count = torch.unique(groups, return_inverse=True, return_counts=True)
    return rewards.double(), index, count.double()


def _sums(values: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """Sums of each group [G]."""
    return torch.zeros_like(count).index_add(0, index, values)


def _spread(values: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """Largest minus smallest reward of each group [G]: exactly 0 when they are all the same,
    which a standard deviation in floating point is not."""
    empty = torch.zeros_like(count)
    highest = empty.scatter_reduce(0, index, values, "amax", include_self=False)
    return highest - empty.scatter_reduce(0, index, values, "amin", include_self=False)
