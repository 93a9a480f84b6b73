"""Losses of reward models: from comparisons, from right and wrong answers, from their steps.

One score an answer or step goes in, one loss a row comes out; the caller sums them and divides by
the rows of the whole step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

Statistics = dict[str, tuple[Tensor, Tensor]]


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, centring: float = 0.0
) -> Tensor:
    """-log sigma(chosen - rejected - margin) + centring * (chosen + rejected)^2, [N].

    chosen, rejected: scores [N] (Bradley and Terry, 1952). margins: [N], how much better the chosen
    answer was found (Touvron et al., 2023, eq. 2). The second term keeps scores around 0, which
    differences leave free (Eisenstein et al., 2023, arXiv:2312.09244, section 3).
    """
    gap = chosen - rejected
    losses = -logsigmoid(gap if margins is None else gap - margins)
    if centring:
        losses = losses + centring * (chosen + rejected) ** 2
    return losses


def right_or_wrong(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [N] of sigma(score) with labels, bool [N]: of whole answers (Cobbe et al.,
    2021, arXiv:2110.14168) or of steps (Lightman et al., 2023, arXiv:2305.20050)."""
    return binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")


def count_right(scores: Tensor, labels: Tensor) -> Statistics:
    """Share of scores [N] on the right side of 0 (a score of 0 counts half), and the mean score of
    each label."""
    scores, good = scores.detach().float(), labels.float()
    signed = torch.where(labels, scores, -scores)
    right = (signed > 0).float() + 0.5 * (signed == 0).float()
    return {
        "accuracy": (right.sum(), good.sum() + (1 - good).sum()),
        "scores/right": ((scores * good).sum(), good.sum()),
        "scores/wrong": ((scores * (1 - good)).sum(), (1 - good).sum()),
    }
