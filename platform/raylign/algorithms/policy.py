"""Policy losses: one signature, `(PolicyInputs, Coefficients) -> (loss, metrics)`.

Three policies meet in a loss, and it keeps them apart (decoupled PPO, arXiv:2110.00641):
*behaviour* sampled the tokens (a rollout engine, perhaps some versions ago), *old* is the learner's
own policy before the first update on this batch, and the current one is being changed. The clipped
ratio is current / old. What lies between old and behaviour (staleness, and two implementations of
one model that do not quite agree) enters as a truncated importance weight
min(old / behaviour, cap), a constant of the gradient (Yao et al. 2025, "Your efficient RL framework
secretly brings you off-policy RL training"; truncation: Ionides 2008).

A loss is a sum of `weights * value` (see `weighting`): losses and gradients of micro-batches and
ranks add up. Rows must stay whole, since GSPO's ratio belongs to the sequence. Positions of weight
0 may hold anything.

Metrics are (total, count) pairs of detached 0-d tensors, never read here, so nothing waits for the
device. Counts are trained tokens, but for `loss`, whose count is the sum of the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raylign.algorithms.kl import MAX_LOG_RATIO, k3
from raylign.algorithms.masked import divide, masked_sum, sequence_sums

Metrics = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class PolicyInputs:
    """What a policy loss reads; float32 [B, T] each, index t belonging to token t."""

    logprobs: Tensor
    """Current policy, with gradient."""
    entropy: Tensor
    """Entropy in nats of the current policy's distribution that token t was drawn from; with
    gradient when `entropy_coef` is not 0."""
    old_logprobs: Tensor
    """The learner's policy before the first update on this batch."""
    behaviour_logprobs: Tensor
    """The policy that sampled, as it reported."""
    advantages: Tensor
    weights: Tensor
    """`weighting.token_weights`: positive on trained tokens, 0 elsewhere."""
    reference_logprobs: Tensor | None = None
    """The policy that KL holds on to."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Numbers of a policy loss."""

    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    kl_coef: float = 0.0
    """Weight of k3, the estimate of KL(policy || reference)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    importance_cap: float = 2.0
    """Truncation of old / behaviour."""
    dual_clip: float = 3.0
    """Bound of the ratio for negative advantages; `dual_clip_loss` only, must exceed 1."""


def ppo_clip_loss(inputs: PolicyInputs, coefficients: Coefficients) -> tuple[Tensor, Metrics]:
    """Clipped surrogate per token (PPO, arXiv:1707.06347, eq. 7), with two bounds as in DAPO."""
    inputs = _clean(inputs)
    ratio = _exp(inputs.logprobs - inputs.old_logprobs)
    surrogate, clipped = _clip(ratio, inputs.advantages, coefficients)
    return _total(inputs, coefficients, surrogate, clipped, _log_importance(inputs))


def dual_clip_loss(inputs: PolicyInputs, coefficients: Coefficients) -> tuple[Tensor, Metrics]:
    """`ppo_clip_loss` that also bounds the ratio at `dual_clip` for negative advantages, where PPO
    leaves it free (arXiv:1912.09729, eq. 5): one token that became far likelier cannot dominate."""
    inputs = _clean(inputs)
    ratio = _exp(inputs.logprobs - inputs.old_logprobs)
    surrogate, clipped = _clip(ratio, inputs.advantages, coefficients)
    floor = coefficients.dual_clip * inputs.advantages
    floored = (inputs.advantages < 0) & (surrogate < floor)
    surrogate, clipped = torch.where(floored, floor, surrogate), clipped | floored
    return _total(inputs, coefficients, surrogate, clipped, _log_importance(inputs))


def gspo_loss(inputs: PolicyInputs, coefficients: Coefficients) -> tuple[Tensor, Metrics]:
    """Clipped surrogate with one ratio a sequence: the geometric mean of its tokens' ratios (GSPO,
    arXiv:2507.18071, eq. 5 and 7). The importance weight is the sequence's too.

    Clip bounds are three orders of magnitude smaller than for token ratios.
    """
    inputs = _clean(inputs)
    active = inputs.weights > 0
    ratio = _exp(_sequence_means(inputs.logprobs - inputs.old_logprobs, active))
    surrogate, clipped = _clip(ratio, inputs.advantages, coefficients)
    log_importance = _sequence_means(_log_importance(inputs), active)
    return _total(inputs, coefficients, surrogate, clipped, log_importance)


def cispo_loss(inputs: PolicyInputs, coefficients: Coefficients) -> tuple[Tensor, Metrics]:
    """REINFORCE weighted by the clipped ratio as a constant (CISPO, MiniMax-M1, arXiv:2506.13585,
    eq. 4): clipping bounds a token's weight and never silences the token.

    `clip_fraction` counts ratios out of bounds, whatever the advantage.
    """
    inputs = _clean(inputs)
    ratio = _exp(inputs.logprobs - inputs.old_logprobs).detach()
    weight = ratio.clamp(1 - coefficients.clip_low, 1 + coefficients.clip_high)
    surrogate = weight * inputs.advantages * inputs.logprobs
    return _total(inputs, coefficients, surrogate, weight != ratio, _log_importance(inputs))


def _clean(inputs: PolicyInputs) -> PolicyInputs:
    """Zeros at weight 0, so that nothing there (not even NaN) reaches a sum or, through 0 * NaN, a
    gradient; and no gradient into what the loss takes as given."""
    active = inputs.weights > 0
    reference = inputs.reference_logprobs
    return PolicyInputs(
        logprobs=torch.where(active, inputs.logprobs, 0.0),
        entropy=torch.where(active, inputs.entropy, 0.0),
        old_logprobs=torch.where(active, inputs.old_logprobs, 0.0).detach(),
        behaviour_logprobs=torch.where(active, inputs.behaviour_logprobs, 0.0).detach(),
        advantages=torch.where(active, inputs.advantages, 0.0).detach(),
        weights=inputs.weights.detach(),
        reference_logprobs=(
            None if reference is None else torch.where(active, reference, 0.0).detach()
        ),
    )


def _log_importance(inputs: PolicyInputs) -> Tensor:
    """log(old / behaviour) [B, T]."""
    return inputs.old_logprobs - inputs.behaviour_logprobs


def _sequence_means(values: Tensor, active: Tensor) -> Tensor:
    """Mean over each sequence's trained tokens, repeated along it [B, T]."""
    means = divide(sequence_sums(values, active), active.sum(dim=1))
    return means[:, None].expand_as(values)


def _exp(log_ratio: Tensor) -> Tensor:
    """exp that cannot overflow; beyond `MAX_LOG_RATIO` the gradient is 0."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _clip(ratio: Tensor, advantages: Tensor, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
    """min(ratio A, clip(ratio) A) and where the second is smaller, that is, holds the first."""
    free = ratio * advantages
    held = ratio.clamp(1 - coefficients.clip_low, 1 + coefficients.clip_high) * advantages
    return torch.minimum(free, held), held < free


def _total(
    inputs: PolicyInputs,
    coefficients: Coefficients,
    surrogate: Tensor,
    clipped: Tensor,
    log_importance: Tensor,
) -> tuple[Tensor, Metrics]:
    """-importance * surrogate + kl_coef * k3 - entropy_coef * entropy, weighted and summed.

    Raises `ValueError` when `kl_coef` is not 0 and there is no reference.
    """
    bound = math.log(coefficients.importance_cap)
    importance = log_importance.clamp(max=bound).exp()
    values = -importance * surrogate
    measured = {
        "importance/mean": importance,
        "importance/truncated": log_importance > bound,
        "clip_fraction": clipped,
        "entropy": inputs.entropy,
    }
    if inputs.reference_logprobs is not None:
        measured["kl"] = k3(inputs.logprobs, inputs.reference_logprobs)
        if coefficients.kl_coef:
            values = values + coefficients.kl_coef * measured["kl"]
    elif coefficients.kl_coef:
        raise ValueError(f"kl_coef={coefficients.kl_coef} needs reference_logprobs")
    if coefficients.entropy_coef:
        values = values - coefficients.entropy_coef * inputs.entropy
    loss = (inputs.weights * values).sum()
    active = inputs.weights > 0
    tokens = active.sum().float()
    metrics = {
        name: (masked_sum(value.detach().float(), active), tokens)
        for name, value in measured.items()
    }
    return loss, metrics | {"loss": (loss.detach(), inputs.weights.sum())}
