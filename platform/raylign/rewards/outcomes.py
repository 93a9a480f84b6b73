"""What comes of scoring: numbers with names, or a reason why there are none.

A zero would say that the completion was bad. A source that broke says nothing about it, and in a
group-relative algorithm an invented zero would also raise its siblings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from raylign.records import Trajectory

LARGEST = 1e9
"""No reward means more than this; beyond, squares of float32 lose everything that is ordinary."""


class SourceFailure(RuntimeError):
    """A source of rewards did not work; worth another attempt, and no completion's fault."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A trajectory that got no reward."""

    prompt_id: str
    group_id: str
    reason: str
    """One of few, to be counted: `reward raised ValueError`, `reward is nan`, ..."""
    detail: str = ""
    """What the exception said, at most 200 characters."""
    trajectory: Trajectory | None = field(default=None, compare=False, repr=False)
    """Itself, to be looked at; None where nothing was sampled."""


Measured = dict[str, float] | Rejection
"""The named numbers that a source gives a trajectory, or why it gives none."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Trajectories with rewards, and those without; both in the order they came."""

    kept: list[Trajectory]
    rejected: list[Rejection]


def reject(trajectory: Trajectory, reason: str, detail: str = "") -> Rejection:
    """The rejection of `trajectory`."""
    return Rejection(trajectory.prompt_id, trajectory.group_id, reason, detail[:200], trajectory)


def read_value(trajectory: Trajectory, value: Any, what: str = "reward") -> Measured:
    """What a source said, as named numbers: a plain number is the part `score`, truth values count
    as 0 and 1, and anything that is not finite, too large, or no number rejects the trajectory."""
    try:
        if not isinstance(value, Mapping):
            return {"score": _to_number(value, what)}
        if not value:
            raise _Unusable(f"{what} has no parts")
        return {_to_name(k, what): _to_number(v, f"{what} part {k}") for k, v in value.items()}
    except _Unusable as error:
        return reject(trajectory, str(error))


def read_batch(
    trajectories: Sequence[Trajectory], values: Sequence[Any], what: str = "reward"
) -> list[Measured]:
    """What a source said of all of `trajectories` at once, in order; of another number of values
    nobody knows whose they are, and all are rejected."""
    if len(values) != len(trajectories):
        reason = f"{what} gave a wrong number of values"
        detail = f"{len(values)} for {len(trajectories)} completions"
        return [reject(trajectory, reason, detail) for trajectory in trajectories]
    return [
        value if isinstance(value, Rejection) else read_value(trajectory, value, what)
        for trajectory, value in zip(trajectories, values, strict=True)
    ]


class _Unusable(Exception):
    """A reward that is not one; the message is the reason."""


def _to_name(name: Any, what: str) -> str:
    if not isinstance(name, str):
        raise _Unusable(f"{what} part name is {_describe(name)}")
    return name


def _to_number(value: Any, what: str) -> float:
    if not isinstance(value, Real | np.bool_):
        raise _Unusable(f"{what} is {_describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise _Unusable(f"{what} is too large") from None
    if not math.isfinite(number):
        raise _Unusable(f"{what} is {number}")
    if abs(number) > LARGEST:
        raise _Unusable(f"{what} is too large")
    return number


def _describe(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
