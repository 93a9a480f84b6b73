"""Policy losses: one signature, `(PolicyInputs, Coefficients) -> (loss, metrics)`.

Three policies meet in a loss, and it keeps them apart (decoupled PPO, arXiv:2110.00641):
*behaviour* sampled the tokens (a rollout engine, perhaps some versions ago), *old* is the learner's
own policy before the first update on this batch, and the current one is being changed. The clipped
ratio is current / old. What lies between old and behaviour enters as a weight, a constant of the
gradient; see `importance`.

A loss is a sum of `weights * value` (see `weighting`): losses and gradients of micro-batches and
ranks add up. Rows must stay whole, since some ratios belong to the sequence. Positions of weight 0
may hold anything.

Metrics are (total, count) pairs of detached 0-d tensors, never read here, so nothing waits for the
device. Counts are trained tokens, but for `loss`, whose count is the sum of the weights. `kl` is
always k3, whatever estimate is trained with, so that runs compare.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from raylign.algorithms.importance import Importance, Level, combine_ratios, correct_importance
from raylign.algorithms.kl import ESTIMATORS, MAX_LOG_RATIO, k3
from raylign.algorithms.masked import masked_sum

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
    pairs: Tensor | None = None
    """int64 [B], pairwise losses only: `online_preference.pair_numbers` of the rows."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Numbers of an algorithm: of its loss, and of how rewards become advantages."""

    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound of the ratio for negative advantages; every loss that clips a surrogate has it."""
    kl_coef: float = 0.0
    """Weight of the estimate of KL(policy || reference)."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Whether the KL is a term of the loss, or taken off the rewards (see `credit`)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """A row of `kl.ESTIMATORS`."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    importance: Importance = field(default_factory=Importance)
    """Correction of old / behaviour."""
    gamma: float = 1.0
    """Discount a token, with a value function."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    value_clip: float | None = 0.2
    """Farthest that a value is moved by an update; None does not clip."""
    value_coef: float = 0.5
    """Weight of the critic's loss."""
    whiten: bool = False
    """Whether the advantages of a batch's tokens are brought to mean 0 and variance 1."""
    beta: float = 0.1
    """Pairwise losses: strength of their implicit KL."""


def ppo_clip_loss(inputs: PolicyInputs, coefficients: Coefficients) -> tuple[Tensor, Metrics]:
    """Clipped surrogate per token (PPO, arXiv:1707.06347, eq. 7), with two bounds as in DAPO."""
    inputs = _clean(inputs)
    ratio = _exp(inputs.logprobs - inputs.old_logprobs)
    surrogate, clipped = _clip(ratio, inputs.advantages, coefficients)
    return _total(inputs, coefficients, surrogate, clipped)


def gspo_loss(inputs: PolicyInputs, coefficients: Coefficients) -> tuple[Tensor, Metrics]:
    """Clipped surrogate with one ratio a sequence: the geometric mean of its tokens' ratios (GSPO,
    arXiv:2507.18071, eq. 5 and 7).

    Clip bounds are three orders of magnitude smaller than for token ratios.
    """
    inputs = _clean(inputs)
    active = inputs.weights > 0
    logs = combine_ratios(inputs.logprobs - inputs.old_logprobs, active, "geometric")
    surrogate, clipped = _clip(_exp(logs), inputs.advantages, coefficients)
    return _total(inputs, coefficients, surrogate, clipped)


def gspo_token_loss(inputs: PolicyInputs, coefficients: Coefficients) -> tuple[Tensor, Metrics]:
    """`gspo_loss` for advantages that differ between the tokens of a sequence (arXiv:2507.18071,
    eq. 13 and 14): the sequence's ratio is a constant, and the gradient passes through the token.
    With one advantage a sequence, and a mean over its tokens, value and gradient are GSPO's."""
    return _clip_sequence_ratio(inputs, coefficients, "geometric")


def sequence_clip_loss(inputs: PolicyInputs, coefficients: Coefficients) -> tuple[Tensor, Metrics]:
    """Clipped surrogate in which the whole completion is one action, as RLOO has it
    (arXiv:2402.14740): its ratio is the product of its tokens' ratios.

    The gradient of ratio * A is ratio * A * (sum over tokens of grad log p), which is what each
    token contributes here; the *value* is that of the sequence counted once a token.
    """
    return _clip_sequence_ratio(inputs, coefficients, "sequence")


def cispo_loss(inputs: PolicyInputs, coefficients: Coefficients) -> tuple[Tensor, Metrics]:
    """REINFORCE weighted by the clipped ratio as a constant (CISPO, MiniMax-M1, arXiv:2506.13585,
    eq. 4): clipping bounds a token's weight and never silences the token.

    `clip_fraction` counts ratios out of bounds, whatever the advantage.
    """
    inputs = _clean(inputs)
    ratio = _exp(inputs.logprobs - inputs.old_logprobs).detach()
    weight = ratio.clamp(1 - coefficients.clip_low, 1 + coefficients.clip_high)
    surrogate = weight * inputs.advantages * inputs.logprobs
    return _total(inputs, coefficients, surrogate, weight != ratio)


def measure_tokens(inputs: PolicyInputs, measured: dict[str, Tensor]) -> Metrics:
    """Totals of `measured` ([B, T] each) over the trained tokens, with their count."""
    active = inputs.weights > 0
    tokens = active.sum().float()
    return {
        name: (masked_sum(value.detach().float(), active), tokens)
        for name, value in measured.items()
    }


def _clip_sequence_ratio(
    inputs: PolicyInputs, coefficients: Coefficients, level: Level
) -> tuple[Tensor, Metrics]:
    """Value of the sequence's ratio, gradient of the token's."""
    inputs = _clean(inputs)
    active = inputs.weights > 0
    logs = combine_ratios(inputs.logprobs - inputs.old_logprobs, active, level).detach()
    # exp(x - x) is 1 with the gradient of x, however far away the sequence's ratio is.
    ratio = _exp(logs) * (inputs.logprobs - inputs.logprobs.detach()).exp()
    surrogate, clipped = _clip(ratio, inputs.advantages, coefficients)
    return _total(inputs, coefficients, surrogate, clipped)


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
        pairs=inputs.pairs,
    )


def _exp(log_ratio: Tensor) -> Tensor:
    """exp that cannot overflow; beyond `MAX_LOG_RATIO` the gradient is 0."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _clip(ratio: Tensor, advantages: Tensor, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
    """min(ratio A, clip(ratio) A), and where the second is smaller, that is, holds the first.

    With `dual_clip`, also where A < 0 and c A is larger than that minimum (arXiv:1912.09729, eq.
    5): PPO leaves the ratio free there, and one token that became far likelier could dominate.
    """
    free = ratio * advantages
    held = ratio.clamp(1 - coefficients.clip_low, 1 + coefficients.clip_high) * advantages
    surrogate, clipped = torch.minimum(free, held), held < free
    if coefficients.dual_clip is not None:
        floor = coefficients.dual_clip * advantages
        floored = (advantages < 0) & (surrogate < floor)
        surrogate, clipped = torch.where(floored, floor, surrogate), clipped | floored
    return surrogate, clipped


def _total(
    inputs: PolicyInputs, coefficients: Coefficients, surrogate: Tensor, clipped: Tensor
) -> tuple[Tensor, Metrics]:
    """-importance * surrogate + kl_coef * kl - entropy_coef * entropy, weighted and summed.

    Raises `ValueError` when a KL belongs into the loss and there is no reference.
    """
    importance, hit = correct_importance(
        inputs.old_logprobs - inputs.behaviour_logprobs,
        inputs.weights > 0,
        coefficients.importance,
    )
    values = -importance * surrogate
    measured = {
        "importance/mean": importance,
        "clip_fraction": clipped,
        "entropy": inputs.entropy,
    }
    if coefficients.importance.mode != "none":
        name = "truncated" if coefficients.importance.mode == "truncate" else "masked"
        measured[f"importance/{name}"] = hit
    penalised = coefficients.kl_coef != 0 and coefficients.kl_in == "loss"
    if inputs.reference_logprobs is not None:
        measured["kl"] = k3(inputs.logprobs, inputs.reference_logprobs)
        if penalised:
            estimate = ESTIMATORS[coefficients.kl_estimator]
            penalty = estimate(inputs.logprobs, inputs.reference_logprobs)
            values = values + coefficients.kl_coef * penalty
    elif penalised:
        raise ValueError(f"kl_coef={coefficients.kl_coef} needs reference_logprobs")
    if coefficients.entropy_coef:
        values = values - coefficients.entropy_coef * inputs.entropy
    loss = (inputs.weights * values).sum()
    metrics = measure_tokens(inputs, measured)
    return loss, metrics | {"loss": (loss.detach(), inputs.weights.sum())}
