"""From what sources say of trajectories to one reward each; what cannot be scored is rejected.

Here is also the one place that says how parts are weighed when a recipe does not.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from raylign.config import ShapingConfig, UserError
from raylign.records import Prompt, Trajectory
from raylign.rewards.outcomes import (
    LARGEST,
    Measured,
    Rejection,
    Scored,
    SourceFailure,
    read_value,
    reject,
)
from raylign.rewards.shaping import RunningScale, charge_length, clip_reward, penalise_length
from raylign.rewards.verifiers import RewardFunction

__all__ = [
    "WEIGHTS",
    "Rejection",
    "Scored",
    "find_extras",
    "measure",
    "rescale",
    "shape",
    "sum_parts",
    "sum_sources",
]

# What the parts of a source weigh unless a recipe says it; a source with none of these must have a
# single part, which weighs 1.
WEIGHTS = {"score": 1.0, "correct": 1.0, "format": 0.1}
# The one number that a source gives to a sum of several sources, by preference.
_MAIN = ("score", "correct")


def measure(
    function: RewardFunction, trajectories: Sequence[Trajectory], prompt: Prompt
) -> list[Measured]:
    """Call `function(completion, reference)` for each completion of `prompt`; a function with
    parameters `prompt` (its text) or `trajectory` is given those, too.

    A function that raises has that sample rejected. Raises what says nothing about the sample:
    `SourceFailure` (worth another attempt) and `UserError`.
    """
    extras = find_extras(function)
    return [_measure_one(function, extras, trajectory, prompt) for trajectory in trajectories]


def find_extras(function: Any) -> frozenset[str]:
    """Which of `prompt` and `trajectory` a function takes by name."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some functions written in C have none to look at
        return frozenset()
    return frozenset(
        name
        for name in ("prompt", "trajectory")
        if name in parameters
        and parameters[name].kind in (inspect.Parameter.KEYWORD_ONLY, _EITHER)
        and list(parameters).index(name) >= (2 if parameters[name].kind is _EITHER else 0)
    )


_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD


def _measure_one(
    function: RewardFunction, extras: frozenset[str], trajectory: Trajectory, prompt: Prompt
) -> Measured:
    given: dict[str, Any] = {"prompt": prompt.text, "trajectory": trajectory}
    keywords = {name: given[name] for name in extras}
    try:
        value = function(trajectory.text, prompt.reference, **keywords)
    except (SourceFailure, UserError):
        raise
    except Exception as error:  # the user's code: anything may happen there, and it is counted
        return reject(trajectory, f"reward raised {type(error).__name__}", str(error))
    return read_value(trajectory, value)


def sum_parts(
    trajectories: Sequence[Trajectory], measured: Sequence[Measured], weights: Mapping[str, float]
) -> Scored:
    """Totals of one source's parts: summed with `weights`, or by `WEIGHTS` where those are empty.

    A part without a weight is kept and weighs 0; a sample that lacks a weighted part which others
    have is rejected. Raises `UserError` when a weight names a part that none of the samples has, or
    when nothing says what the parts weigh.
    """
    every = [parts for parts in measured if not isinstance(parts, Rejection)]
    known = {name for parts in every for name in parts}
    if every and weights.keys() - known:
        raise UserError(
            f"align.reward.weights names {', '.join(sorted(weights.keys() - known))}, which the "
            f"source does not give; weigh some of its parts instead: {', '.join(sorted(known))}"
        )
    if not weights:
        weights = {name: weight for name, weight in WEIGHTS.items() if name in known}
    if every and not weights and all(len(parts) > 1 for parts in every):
        raise UserError(
            f"align.reward.source gives {', '.join(sorted(known))}; say what they count with "
            f"align.reward.weights={{{sorted(known)[0]}: 1.0, ...}}"
        )
    totals = [
        parts if isinstance(parts, Rejection) else _weigh(trajectory, parts, weights)
        for trajectory, parts in zip(trajectories, measured, strict=True)
    ]
    return _sort(trajectories, measured, totals)


def _weigh(
    trajectory: Trajectory, parts: Mapping[str, float], weights: Mapping[str, float]
) -> float | Rejection:
    if not weights:
        if len(parts) > 1:
            return reject(trajectory, "reward has parts of unknown weight")
        weights = dict.fromkeys(parts, 1.0)
    missing = sorted(weights.keys() - parts.keys())
    if missing:
        return reject(trajectory, f"reward lacks part {missing[0]}")
    return _total(trajectory, [weight * parts[name] for name, weight in weights.items()])


def sum_sources(
    trajectories: Sequence[Trajectory],
    measured: Mapping[str, Sequence[Measured]],
    weights: Mapping[str, float],
) -> Scored:
    """Totals over several named sources, each with one number: its part `score`, `correct`, or its
    only one.

    A trajectory that any of them rejects is rejected. Its parts are kept under the sources' names,
    and what a source says beside its number as `source/part`. Raises `UserError` for a source whose
    parts do not say which of them counts.
    """
    merged: list[Measured] = []
    totals: list[float | Rejection] = []
    for row, trajectory in enumerate(trajectories):
        parts: dict[str, float] = {}
        refused = [m[row] for m in measured.values() if isinstance(m[row], Rejection)]
        for name, values in measured.items():
            value = values[row]
            if not isinstance(value, Rejection):
                main = _find_main(name, value)
                parts |= {f"{name}/{key}": number for key, number in value.items() if key != main}
                parts[name] = value[main]
        merged.append(parts)
        first = refused[0] if refused else None
        if isinstance(first, Rejection):
            totals.append(first)
        else:
            totals.append(_total(trajectory, [weights[name] * parts[name] for name in measured]))
    return _sort(trajectories, merged, totals)


def _find_main(name: str, parts: Mapping[str, float]) -> str:
    found = next((key for key in _MAIN if key in parts), None)
    if found is None and len(parts) == 1:
        found = next(iter(parts))
    if found is None:
        raise UserError(
            f"align.reward.parts.{name} gives {', '.join(sorted(parts))} and none of them is called"
            " score; let its source return a single number, or name it so"
        )
    return found


def _total(trajectory: Trajectory, terms: Sequence[float]) -> float | Rejection:
    try:
        total = math.fsum(terms)
    except (OverflowError, ValueError):
        total = math.inf
    if not abs(total) <= LARGEST:
        return reject(trajectory, "reward total is too large")
    return total


def _sort(
    trajectories: Sequence[Trajectory],
    measured: Sequence[Measured],
    totals: Sequence[float | Rejection],
) -> Scored:
    scored = Scored([], [])
    for trajectory, parts, total in zip(trajectories, measured, totals, strict=True):
        if isinstance(total, Rejection):
            scored.rejected.append(total)
        elif not isinstance(parts, Rejection):
            scored.kept.append(trajectory.scored(total, dict(parts)))
    return scored


def shape(
    trajectories: Sequence[Trajectory], config: ShapingConfig, longest: int
) -> list[Trajectory]:
    """Totals after what depends on each trajectory alone, in the order of `ShapingConfig`;
    `longest` is the length of the longest completion, in tokens."""
    return [t.scored(_shape_one(t, config, longest), t.reward_parts) for t in trajectories]


def _shape_one(trajectory: Trajectory, config: ShapingConfig, longest: int) -> float:
    total, tokens = _reward(trajectory), trajectory.sampled_tokens
    if config.overlong_margin:
        total += config.overlong_penalty * penalise_length(tokens, longest, config.overlong_margin)
    total += charge_length(tokens, config.length_coef)
    return _clip(total, config) if config.scale == "none" else total


def rescale(
    trajectories: Sequence[Trajectory], config: ShapingConfig, scale: RunningScale
) -> tuple[list[Trajectory], RunningScale]:
    """With `scale=running`: totals over the deviation of all rewards so far, these included, then
    clipped; and the new moments. Without, what was given."""
    if config.scale == "none":
        return list(trajectories), scale
    scale = scale.include(_reward(t) for t in trajectories)
    return [
        t.scored(_clip(scale.scale(_reward(t)), config), t.reward_parts) for t in trajectories
    ], scale


def _clip(total: float, config: ShapingConfig) -> float:
    return total if config.clip is None else clip_reward(total, *config.clip)


def _reward(trajectory: Trajectory) -> float:
    if trajectory.reward is None:
        raise ValueError(f"trajectory of prompt {trajectory.prompt_id} has no reward yet")
    return trajectory.reward
