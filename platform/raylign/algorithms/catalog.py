"""What each algorithm is: an advantage, a loss, a weighting, and its authors' coefficients.

A new algorithm is a row here, and a function if it needs one; nothing else knows their names.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from raylign.algorithms.advantages import batch_normalised, group_relative, leave_one_out
from raylign.algorithms.policy import (
    Coefficients,
    Metrics,
    PolicyInputs,
    cispo_loss,
    dual_clip_loss,
    gspo_loss,
    ppo_clip_loss,
)
from raylign.algorithms.weighting import Weighting

AdvantageFunction = Callable[[Tensor, Tensor], Tensor]
"""(rewards [B], groups int64 [B]) -> advantages [B], on the whole batch."""
LossFunction = Callable[[PolicyInputs, Coefficients], tuple[Tensor, Metrics]]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A policy-gradient algorithm as a value."""

    name: str
    doc: str
    """What sets it apart, in one line."""
    paper: str
    """arXiv number."""
    advantage: AdvantageFunction
    loss: LossFunction
    weighting: Weighting
    """How tokens are averaged; see `raylign.algorithms.weighting`."""
    coefficients: Coefficients = field(default_factory=Coefficients)
    """What the authors used, as far as they said."""
    needs_groups: bool = True
    """Whether advantages compare the completions of one prompt, which then need siblings."""
    needs_values: bool = False
    """Whether advantages need a value function."""


_ROWS = (
    Algorithm(
        name="grpo",
        doc="advantage within the group, over its deviation; mean of sequence means (eq. 3)",
        paper="2402.03300",
        advantage=partial(group_relative, scale_by_std=True),
        loss=ppo_clip_loss,
        weighting="sequences",
        coefficients=Coefficients(kl_coef=0.04),
    ),
    Algorithm(
        name="grpo_dual_clip",
        doc="grpo with the ratio bounded for negative advantages too; for stale batches",
        paper="1912.09729",
        advantage=partial(group_relative, scale_by_std=True),
        loss=dual_clip_loss,
        weighting="sequences",
        coefficients=Coefficients(kl_coef=0.04),
    ),
    Algorithm(
        name="dr_grpo",
        doc="grpo without division by deviation or length, which bias towards easy and long",
        paper="2503.20783",
        advantage=partial(group_relative, scale_by_std=False),
        loss=ppo_clip_loss,
        weighting="constant",
    ),
    Algorithm(
        name="dapo",
        doc="grpo with a higher upper clip, a mean over all tokens, and no KL",
        paper="2503.14476",
        advantage=partial(group_relative, scale_by_std=True),
        loss=ppo_clip_loss,
        weighting="tokens",
        coefficients=Coefficients(clip_high=0.28),
    ),
    Algorithm(
        name="rloo",
        doc="reward minus the siblings' mean; summed, not averaged, over a sequence's tokens",
        paper="2402.14740",
        advantage=leave_one_out,
        loss=ppo_clip_loss,
        weighting="constant",
    ),
    Algorithm(
        name="reinforce_pp",
        doc="reward normalised over the whole batch; needs no groups; mean over all tokens",
        paper="2501.03262",
        advantage=batch_normalised,
        loss=ppo_clip_loss,
        weighting="tokens",
        needs_groups=False,
    ),
    Algorithm(
        name="gspo",
        doc="grpo with one length-normalised ratio a sequence, and clip bounds to match",
        paper="2507.18071",
        advantage=partial(group_relative, scale_by_std=True),
        loss=gspo_loss,
        weighting="sequences",
        coefficients=Coefficients(clip_low=3e-4, clip_high=4e-4),
    ),
    Algorithm(
        name="cispo",
        doc="REINFORCE weighted by the ratio, capped above only; no token is ever silenced",
        paper="2506.13585",
        advantage=partial(group_relative, scale_by_std=True),
        loss=cispo_loss,
        weighting="tokens",
        # The authors set no lower bound and did not publish the upper one; a largest weight of 5 is
        # in use since ScaleRL (arXiv:2510.13786).
        coefficients=Coefficients(clip_low=1.0, clip_high=4.0),
    ),
)

ALGORITHMS: dict[str, Algorithm] = {row.name: row for row in _ROWS}


def find_algorithm(name: str) -> Algorithm:
    """The row called `name`; raises `ValueError` with a suggestion when there is none."""
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    close = difflib.get_close_matches(name.lower().replace("-", "_"), ALGORITHMS, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    raise ValueError(f"unknown algorithm {name!r}; {hint}known: {', '.join(ALGORITHMS)}")
