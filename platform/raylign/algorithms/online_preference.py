"""Online DPO: preferences are made from rewards of what the policy itself just sampled.

Of every group the best and the worst completion by reward are a pair (Guo et al. 2024,
arXiv:2402.04792, with a verifier, reward model or judge as annotator); the others teach nothing,
nor does a group whose rewards are all the same. The caller keeps both rows of a pair in one
micro-batch, and gives weight to rows of pairs only:

    pairs = pair_numbers(rewards, groups)            # on the whole batch
    mask = mask & (pairs >= 0)[:, None]              # then `token_weights(mask, "sequences", ...)`
"""

from __future__ import annotations

import torch
from torch import Tensor

from raylign.algorithms.kl import k3
from raylign.algorithms.masked import divide, sequence_sums
from raylign.algorithms.policy import Coefficients, Metrics, PolicyInputs, measure_tokens
from raylign.algorithms.preference import Answers, Numbers, compare_rewards, dpo


def select_pairs(rewards: Tensor, groups: Tensor) -> Tensor:
    """int64 [P, 2]: rows of the best and the worst completion of each group, in order of groups.

    Among equals the first row counts; a group whose rewards are all the same makes no pair.
    Args: rewards [B]; groups int64 [B]. Raises `ValueError` for a reward that is not finite.
    """
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("rewards are not finite; reject such samples beforehand")
    pairs = []
    for group in torch.unique(groups).tolist():
        rows = (groups == group).nonzero()[:, 0]
        best, worst = rows[rewards[rows].argmax()], rows[rewards[rows].argmin()]
        if rewards[best] > rewards[worst]:
            pairs.append(torch.stack([best, worst]))
    return torch.stack(pairs) if pairs else groups.new_empty((0, 2))


def pair_numbers(rewards: Tensor, groups: Tensor) -> Tensor:
    """int64 [B]: which of `select_pairs` a row belongs to, -1 for none. Errors as there."""
    pairs = select_pairs(rewards, groups)
    numbers = torch.full_like(groups, -1)
    count = torch.arange(len(pairs), device=groups.device)
    numbers[pairs.flatten()] = count.repeat_interleave(2)
    return numbers


def pair_signs(rewards: Tensor, groups: Tensor) -> Tensor:
    """[B]: 1 for the best and -1 for the worst of a group, 0 for all others; errors as
    `select_pairs`."""
    pairs = select_pairs(rewards, groups)
    signs = torch.zeros_like(rewards)
    signs[pairs[:, 0]], signs[pairs[:, 1]] = 1.0, -1.0
    return signs


def online_dpo_loss(inputs: PolicyInputs, coefficients: Coefficients) -> tuple[Tensor, Metrics]:
    """-log sigma(beta * (chosen log-ratio - rejected log-ratio)) of each pair (DPO,
    arXiv:2305.18290, eq. 7), weighted by the sum of its tokens' weights.

    With the weighting `sequences` over the rows of pairs, that is the mean over pairs. Of each pair
    the row with the positive advantage was chosen. Nothing corrects for who sampled: DPO's loss
    holds for any pair. Metrics count pairs, but for `entropy` and `kl`, which count tokens.

    Raises `ValueError` without `pairs` or reference, and for a pair of which one row is missing.
    """
    if inputs.pairs is None or inputs.reference_logprobs is None:
        raise ValueError("online DPO needs pairs and reference_logprobs")
    active = inputs.weights > 0
    chosen, rejected = _find_rows(inputs.pairs, inputs.advantages, active)
    sums = sequence_sums(inputs.logprobs, active)
    reference = sequence_sums(inputs.reference_logprobs, active)
    lengths = active.sum(dim=1)
    judged = dpo(
        Answers(sums[chosen], lengths[chosen], reference[chosen]),
        Answers(sums[rejected], lengths[rejected], reference[rejected]),
        Numbers(beta=coefficients.beta),
    )
    shares = inputs.weights.detach().sum(dim=1)
    loss = ((shares[chosen] + shares[rejected]) * judged.losses).sum()
    if not len(chosen):
        loss = torch.where(active, inputs.logprobs, 0.0).sum() * 0.0  # backward still runs
    measured = {
        "entropy": inputs.entropy,
        "kl": k3(
            torch.where(active, inputs.logprobs, 0.0),
            torch.where(active, inputs.reference_logprobs, 0.0),
        ),
    }
    metrics = measure_tokens(inputs, measured)
    metrics |= compare_rewards(judged.chosen_rewards, judged.rejected_rewards)
    return loss, metrics | {"loss": (loss.detach(), inputs.weights.sum())}


def _find_rows(pairs: Tensor, advantages: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [P] of the chosen and the rejected answers of the pairs that are trained."""
    signs = divide(sequence_sums(advantages, active), active.sum(dim=1))
    order = torch.argsort(pairs, stable=True)
    chosen = order[(pairs[order] >= 0) & (signs[order] > 0)]
    rejected = order[(pairs[order] >= 0) & (signs[order] < 0)]
    if len(chosen) != len(rejected) or not bool((pairs[chosen] == pairs[rejected]).all()):
        raise ValueError("both rows of a pair belong into one micro-batch, with weight")
    return chosen, rejected
