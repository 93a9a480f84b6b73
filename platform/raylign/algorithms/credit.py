"""Credit assignment: from one reward a completion to one advantage a token.

A rank calls it with its own rows, and with the scalars of the whole batch, so how rows were dealt
to ranks changes nothing. The order of a step:

1. `penalise_tokens` on own rows; where a sequence's KL is taken off its reward, the sums
   `sequence_sums(kl, mask)` of all ranks are put together into `kl_sums` [B].
2. `assign_credit` on own rows.
3. With `coefficients.whiten`: `whiten_moments` on own rows, added up over ranks, into
   `apply_whitening`. Returns are not whitened.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raylign.algorithms.advantages import gae
from raylign.algorithms.catalog import Algorithm
from raylign.algorithms.kl import ESTIMATORS
from raylign.algorithms.policy import Coefficients

# A deviation below this share of the mean is what rounding leaves of equal float32 numbers.
_LEAST_DEVIATION = 1e-7


def penalise_tokens(
    old_logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, coefficients: Coefficients
) -> Tensor:
    """Estimate of KL(old || reference) at each trained token [B, T], 0 outside `mask`; a constant.

    The policy whose KL a reward is reduced by is the one before the update (InstructGPT,
    arXiv:2203.02155, eq. 2).
    """
    old = torch.where(mask, old_logprobs, 0.0).detach()
    reference = torch.where(mask, reference_logprobs, 0.0).detach()
    return ESTIMATORS[coefficients.kl_estimator](old, reference)


def assign_credit(
    algorithm: Algorithm,
    coefficients: Coefficients,
    rewards: Tensor,
    groups: Tensor,
    mask: Tensor,
    rows: Tensor,
    *,
    kl: Tensor | None = None,
    values: Tensor | None = None,
    kl_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(advantages [b, T], returns [b, T] or None), 0 outside `mask`; not yet whitened.

    | algorithm       | advantage of token t                                                       |
    |-----------------|----------------------------------------------------------------------------|
    | of sequences    | f(rewards - kl_coef * kl_sums), the same for all tokens                    |
    | `token_rewards` | f(rewards) - kl_coef * (KL of t and of all later tokens), arXiv:2501.03262 |
    | `needs_values`  | `gae` of -kl_coef * KL of t, and the reward on the last trained token      |

    where f is `algorithm.advantage`, and a KL is subtracted only with `kl_in` "reward". `returns`
    are what a value function should have said; None without one.

    Args: rewards float [B] and groups int64 [B] of the whole batch; mask bool [b, T], the trained
    tokens of the own rows; rows int64 [b], their numbers within the batch; kl [b, T] by
    `penalise_tokens`; values [b, T], entry t of the state in which token t was chosen; kl_sums [B].
    Raises `ValueError` for a reward that is not finite, and for an argument that is missing.
    """
    coef = coefficients.kl_coef if coefficients.kl_in == "reward" else 0.0
    if coef and algorithm.token_rewards and kl is None:
        raise ValueError(f"{algorithm.name} takes its KL off every token's reward: kl is missing")
    if algorithm.advantage is None:
        if values is None:
            raise ValueError(f"{algorithm.name} needs values")
        _refuse_infinite(rewards)
        earned = place_rewards(rewards[rows].to(values.dtype), mask)
        if coef and kl is not None:
            earned = earned - coef * kl
        return gae(earned, values, mask, coefficients.gamma, coefficients.lam)
    if coef and not algorithm.token_rewards:
        if kl_sums is None:
            raise ValueError(f"{algorithm.name} takes its KL off the reward: kl_sums is missing")
        rewards = rewards - coef * kl_sums
    scalars = algorithm.advantage(rewards, groups)[rows]
    advantages = scalars[:, None].expand(mask.shape)
    if coef and algorithm.token_rewards and kl is not None:
        advantages = advantages - coef * sum_ahead(kl, mask)
    return torch.where(mask, advantages, 0.0), None


def place_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """[b, T]: each of `rewards` [b] on the last token under `mask` [b, T] of its row, 0 elsewhere;
    a row without any has none."""
    later = mask.flip(1).cumsum(1).flip(1)  # trained tokens from here on
    return torch.where(mask & (later == 1), rewards[:, None], 0.0)


def sum_ahead(values: Tensor, mask: Tensor) -> Tensor:
    """[b, T]: sum of `values` [b, T] under `mask` over this token and all later ones."""
    return torch.where(mask, values, 0.0).flip(1).cumsum(1).flip(1)


def whiten_moments(values: Tensor, mask: Tensor) -> Tensor:
    """float64 [3]: sum, sum of squares and number of the entries under `mask`; those of all ranks
    (and micro-batches) add up to the batch's."""
    exact = torch.where(mask, values, 0.0).double()
    return torch.stack([exact.sum(), exact.square().sum(), mask.sum().double()])


def apply_whitening(values: Tensor, mask: Tensor, moments: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Mean 0 and variance 1 (n - 1) over the batch whose `moments` were added up; 0 outside `mask`.

    Fewer than two entries, or entries that are all the same but for rounding, teach nothing: 0.
    """
    total, squares, count = moments.double().unbind()
    mean = total / count.clamp(min=1)
    variance = (squares - total * mean).clamp(min=0) / (count - 1).clamp(min=1)
    spread = (count > 1) & (variance.sqrt() > _LEAST_DEVIATION * mean.abs())
    white = (values.double() - mean) / (variance.sqrt() + eps)
    return torch.where(mask & spread, white, 0.0).to(values.dtype)


def _refuse_infinite(rewards: Tensor) -> None:
    bad = int((~torch.isfinite(rewards)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {rewards.numel()} rewards are not finite; reject such samples beforehand"
        )
