"""What each algorithm is: an advantage, a loss, a weighting, and its authors' coefficients.

A new algorithm is a row here, and a function if it needs one; nothing else knows their names.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from raylign.algorithms.advantages import group_relative, keep_rewards, leave_one_out
from raylign.algorithms.importance import Importance
from raylign.algorithms.online_preference import online_dpo_loss, pair_signs
from raylign.algorithms.policy import (
    Coefficients,
    Metrics,
    PolicyInputs,
    cispo_loss,
    gspo_loss,
    gspo_token_loss,
    ppo_clip_loss,
    sequence_clip_loss,
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
    advantage: AdvantageFunction | None
    """None with a value function, whose advantages belong to tokens; see `credit`."""
    loss: LossFunction
    weighting: Weighting
    """How tokens are averaged; see `raylign.algorithms.weighting`."""
    coefficients: Coefficients = field(default_factory=Coefficients)
    """What the authors used, as far as they said."""
    needs_groups: bool = True
    """Whether advantages compare the completions of one prompt, which then need siblings."""
    needs_values: bool = False
    """Whether advantages need a value function."""
    token_rewards: bool = False
    """Whether a KL taken off the rewards belongs to its token and those before it, rather than to
    the sequence as a whole."""
    pairwise: bool = False
    """Whether the loss compares the best and the worst of a group; see `online_preference`."""
    dynamic_sampling: bool = False
    """Whether groups whose rewards are all the same are replaced by further prompts."""
    clips: bool = True
    """Whether the loss clips a surrogate, and so has a dual clip."""


_GROUP_SCALED = partial(group_relative, scale_by_std=True)
_GROUP_CENTRED = partial(group_relative, scale_by_std=False)

_ROWS = (
    Algorithm(
        name="ppo",
        doc="critic, generalised advantages, KL taken off every token's reward, as InstructGPT",
        paper="2203.02155",
        advantage=None,
        loss=ppo_clip_loss,
        weighting="tokens",
        coefficients=Coefficients(kl_coef=0.02, kl_in="reward", kl_estimator="k1", whiten=True),
        needs_groups=False,
        needs_values=True,
        token_rewards=True,
    ),
    Algorithm(
        name="grpo",
        doc="advantage within the group, over its deviation; mean of sequence means (eq. 3)",
        paper="2402.03300",
        advantage=_GROUP_SCALED,
        loss=ppo_clip_loss,
        weighting="sequences",
        coefficients=Coefficients(kl_coef=0.04),
    ),
    Algorithm(
        name="grpo_dual_clip",
        doc="grpo with the ratio bounded for negative advantages too; for stale batches",
        paper="1912.09729",
        advantage=_GROUP_SCALED,
        loss=ppo_clip_loss,
        weighting="sequences",
        coefficients=Coefficients(kl_coef=0.04, dual_clip=3.0),
    ),
    Algorithm(
        name="dr_grpo",
        doc="grpo without division by deviation or length, which bias towards easy and long",
        paper="2503.20783",
        advantage=_GROUP_CENTRED,
        loss=ppo_clip_loss,
        weighting="constant",
    ),
    Algorithm(
        name="dapo",
        doc="grpo with a higher upper clip, a mean over all tokens, no KL, and no group wasted",
        paper="2503.14476",
        advantage=_GROUP_SCALED,
        loss=ppo_clip_loss,
        weighting="tokens",
        coefficients=Coefficients(clip_high=0.28),
        dynamic_sampling=True,
    ),
    Algorithm(
        name="rloo",
        doc="a completion is one action: its reward less its KL, minus the siblings' mean",
        paper="2402.14740",
        advantage=leave_one_out,
        loss=sequence_clip_loss,
        # The sum over a sequence's tokens, not their mean; `max_tokens` only scales all of them.
        weighting="constant",
        coefficients=Coefficients(kl_coef=0.05, kl_in="reward", kl_estimator="k1"),
    ),
    Algorithm(
        name="reinforce_pp",
        doc="reward, less the KL still to come, normalised over all tokens; needs no groups",
        paper="2501.03262",
        advantage=keep_rewards,
        loss=ppo_clip_loss,
        weighting="tokens",
        coefficients=Coefficients(kl_coef=0.01, kl_in="reward", kl_estimator="k1", whiten=True),
        needs_groups=False,
        token_rewards=True,
    ),
    Algorithm(
        name="reinforce_pp_baseline",
        doc="reward minus the group's mean, normalised over all tokens; KL (k2) in the loss",
        paper="2501.03262",
        advantage=_GROUP_CENTRED,
        loss=ppo_clip_loss,
        weighting="tokens",
        coefficients=Coefficients(kl_coef=0.01, kl_estimator="k2", whiten=True),
    ),
    Algorithm(
        name="gspo",
        doc="grpo with one length-normalised ratio a sequence, and clip bounds to match",
        paper="2507.18071",
        advantage=_GROUP_SCALED,
        loss=gspo_loss,
        weighting="sequences",
        coefficients=Coefficients(
            clip_low=3e-4, clip_high=4e-4, importance=Importance(level="geometric")
        ),
    ),
    Algorithm(
        name="gspo_token",
        doc="gspo whose gradient passes through each token, for advantages that differ in a row",
        paper="2507.18071",
        advantage=_GROUP_SCALED,
        loss=gspo_token_loss,
        weighting="sequences",
        coefficients=Coefficients(
            clip_low=3e-4, clip_high=4e-4, importance=Importance(level="geometric")
        ),
    ),
    Algorithm(
        name="cispo",
        doc="REINFORCE weighted by the ratio, capped above only; no token is ever silenced",
        paper="2506.13585",
        advantage=_GROUP_SCALED,
        loss=cispo_loss,
        weighting="tokens",
        # The authors set no lower bound and did not publish the upper one; a largest weight of 5 is
        # in use since ScaleRL (arXiv:2510.13786).
        coefficients=Coefficients(clip_low=1.0, clip_high=4.0),
        clips=False,
    ),
    Algorithm(
        name="online_dpo",
        doc="DPO on the best and the worst completion of a group; ties teach nothing",
        paper="2402.04792",
        advantage=pair_signs,
        loss=online_dpo_loss,
        weighting="sequences",
        pairwise=True,
        clips=False,
    ),
)

ALGORITHMS: dict[str, Algorithm] = {row.name: row for row in _ROWS}

_WITH_VALUES = ("gamma", "lam", "value_clip", "value_coef")
_WITH_PAIRS = ("beta",)
_WITH_KL = ("kl_in", "kl_estimator")


def find_algorithm(name: str) -> Algorithm:
    """The row called `name`; raises `ValueError` with a suggestion when there is none."""
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    close = difflib.get_close_matches(name.lower().replace("-", "_"), ALGORITHMS, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    raise ValueError(f"unknown algorithm {name!r}; {hint}known: {', '.join(ALGORITHMS)}")


def resolve_coefficients(algorithm: Algorithm, given: Mapping[str, Any]) -> Coefficients:
    """The authors' coefficients, with the `given` ones (fields of `Coefficients`) in their place.

    Raises `ValueError` for one that has no effect with this algorithm.
    """
    for name in given:
        if not _uses(algorithm, name):
            raise ValueError(f"{name} has no effect with {algorithm.name}; leave it out")
    coefficients = replace(algorithm.coefficients, **given)
    for name in _WITH_KL:
        if name in given and coefficients.kl_coef == 0:
            raise ValueError(f"{name} has no effect with kl_coef=0; give kl_coef, or leave it out")
    return coefficients


def needs_reference(algorithm: Algorithm, coefficients: Coefficients) -> bool:
    """Whether the reference's log-probs are read."""
    return algorithm.pairwise or coefficients.kl_coef != 0


def _uses(algorithm: Algorithm, name: str) -> bool:
    if name in _WITH_VALUES:
        return algorithm.needs_values
    if algorithm.pairwise or name in _WITH_PAIRS:
        return algorithm.pairwise and name in _WITH_PAIRS
    return algorithm.clips or name != "dual_clip"
