"""Scores trajectories one by one; what cannot be scored is rejected with a reason, never scored 0.

A zero would say that the completion was bad. A reward function that broke says nothing about it,
and in a group-relative algorithm an invented zero would also raise its siblings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from raylign.config import UserError
from raylign.records import Trajectory
from raylign.rewards.verifiers import RewardFunction


@dataclass(frozen=True, slots=True)
class Rejection:
    """A trajectory that got no reward."""

    prompt_id: str
    group_id: str
    reason: str
    """One of few, to be counted: `reward raised ValueError`, `reward is nan`, ..."""
    detail: str = ""
    """What the exception said, at most 200 characters."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Trajectories with rewards, and those without; both in the order they came."""

    kept: list[Trajectory]
    rejected: list[Rejection]


class _Unusable(Exception):
    """A reward that is not one; the message is the reason."""


def score_trajectories(
    trajectories: Sequence[Trajectory],
    references: Mapping[str, str],
    function: RewardFunction,
    weights: Mapping[str, float],
) -> Scored:
    """Call `function(text, reference)` for each trajectory, `references` being by prompt id.

    Named parts are summed with `weights`; a part without a weight is kept and weighs 0. A plain
    number is the total as it stands. Booleans count as 0 and 1. A function that raises, gives
    anything but finite numbers, or leaves out a weighted part has that sample rejected.

    Raises `UserError` when a weight names a part that none of the samples has.
    """
    parts: list[dict[str, float] | float | Rejection] = [
        _measure(trajectory, references, function) for trajectory in trajectories
    ]
    _check_weights(weights, [p for p in parts if isinstance(p, dict)])
    kept, rejected = [], []
    for trajectory, measured in zip(trajectories, parts, strict=True):
        outcome = _weigh(trajectory, measured, weights)
        if isinstance(outcome, Rejection):
            rejected.append(outcome)
        else:
            kept.append(outcome)
    return Scored(kept, rejected)


def _measure(
    trajectory: Trajectory, references: Mapping[str, str], function: RewardFunction
) -> dict[str, float] | float | Rejection:
    if trajectory.prompt_id not in references:
        return _reject(trajectory, "prompt has no reference")
    try:
        value = function(trajectory.text, references[trajectory.prompt_id])
    except Exception as error:  # the user's code: anything may happen there, and it is counted
        return _reject(trajectory, f"reward raised {type(error).__name__}", str(error))
    try:
        if not isinstance(value, Mapping):
            return _to_number(value, "reward")
        if not value:
            raise _Unusable("reward has no parts")
        return {_to_name(k): _to_number(v, f"reward part {k}") for k, v in value.items()}
    except _Unusable as error:
        return _reject(trajectory, str(error))


def _weigh(
    trajectory: Trajectory,
    measured: dict[str, float] | float | Rejection,
    weights: Mapping[str, float],
) -> Trajectory | Rejection:
    if isinstance(measured, Rejection):
        return measured
    if isinstance(measured, float):
        return trajectory.scored(measured, {})
    missing = sorted(weights.keys() - measured.keys())
    if missing:
        return _reject(trajectory, f"reward lacks part {missing[0]}")
    total = math.fsum(weight * measured[name] for name, weight in weights.items())
    return trajectory.scored(total, measured)


def _check_weights(weights: Mapping[str, float], measured: Sequence[dict[str, float]]) -> None:
    known = {name for parts in measured for name in parts}
    unknown = sorted(weights.keys() - known)
    if measured and unknown:
        raise UserError(
            f"align.reward.weights names {', '.join(unknown)}, which the reward function does not "
            f"give; weigh some of its parts instead: {', '.join(sorted(known))}"
        )


def _to_name(name: Any) -> str:
    if not isinstance(name, str):
        raise _Unusable(f"reward part name is {_describe(name)}")
    return name


def _to_number(value: Any, what: str) -> float:
    if not isinstance(value, Real | np.bool_):
        raise _Unusable(f"{what} is {_describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise _Unusable(f"{what} is too large for a float") from None
    if not math.isfinite(number):
        raise _Unusable(f"{what} is {number}")
    return number


def _describe(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _reject(trajectory: Trajectory, reason: str, detail: str = "") -> Rejection:
    return Rejection(trajectory.prompt_id, trajectory.group_id, reason, detail[:200])
