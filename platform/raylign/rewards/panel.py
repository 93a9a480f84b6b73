"""All sources of a recipe that need no conversation with others: verifiers, functions, models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raylign.config import RewardConfig, UserError
from raylign.records import Prompt, Trajectory
from raylign.rewards.outcomes import Measured, Scored
from raylign.rewards.scoring import measure, sum_parts, sum_sources
from raylign.rewards.source import MATH_SECONDS, load_reward

ONLY = "reward"
"""What the single source of a recipe without parts is called here."""

_OWN_START_S = 2.0
"""Of a process for one program, or of another one for mathematics."""


class Panel:
    """The sources of `config` but its judges, loaded.

    Raises `UserError` for any that cannot be. `policy` is the directory of the model that samples.
    """

    def __init__(self, config: RewardConfig, policy: Path | None = None) -> None:
        self._sources: dict[str, Any] = {}
        for name, (place, source, model, options) in _list_sources(config).items():
            if source == "judge":
                continue
            if source == "model":
                from raylign.rewards.learned import RewardModel  # torch, only where one is used

                assert model is not None  # the config says so
                self._sources[name] = RewardModel(model, policy, place).measure
            else:
                function = load_reward(source, options, config.sandbox, place)
                self._sources[name] = _bind(function)

    def measure(
        self, trajectories: Sequence[Trajectory], prompt: Prompt
    ) -> dict[str, list[Measured]]:
        """What each source says of each trajectory, by the source's name."""
        return {name: measure(trajectories, prompt) for name, measure in self._sources.items()}


def check_sources(config: RewardConfig, policy: Path | None = None, stage: str = "align") -> None:
    """What can be known to be wrong before anything is started; raises `UserError`. With `policy`,
    the directory of the model that samples, also whether a reward model can read it. `stage`: whose
    section of the recipe messages name."""
    for at, source, model, options in _list_sources(config, stage).values():
        if source == "judge":
            if options:
                raise UserError(f"{at}.options has no effect with source=judge; see {stage}.judge")
        elif source == "model":
            if options:
                raise UserError(f"{at}.options has no effect with source=model; leave it out")
            assert model is not None  # the config says so
            if not model.is_dir():
                raise UserError(f"{at}.model={model} is not a directory")
            from raylign.rewards.learned import check_reward_model

            check_reward_model(model, at, policy)
        else:
            load_reward(source, options, config.sandbox, at)


def allow_seconds(config: RewardConfig, completions: int) -> float:
    """What sources with a time limit of their own may take for so many completions, every one of
    which reaches it: a program or an answer that never ends is judged, and no hang."""
    each = 0.0
    for _, source, _, options in _list_sources(config).values():
        if source == "code":
            each += config.sandbox.seconds + _OWN_START_S
        elif source == "math":
            each += 2 * float(options.get("seconds", MATH_SECONDS)) + _OWN_START_S
    return each * completions


def add_up(
    config: RewardConfig,
    trajectories: Sequence[Trajectory],
    measured: Mapping[str, Sequence[Measured]],
) -> Scored:
    """Totals as `config` weighs its sources; `measured` holds all of them by name."""
    if not config.parts:
        return sum_parts(trajectories, measured[ONLY], config.weights)
    weights = {name: part.weight for name, part in config.parts.items()}
    return sum_sources(trajectories, {name: measured[name] for name in weights}, weights)


def _bind(function: Any) -> Any:
    def measure_with(trajectories: Sequence[Trajectory], prompt: Prompt) -> list[Measured]:
        return measure(function, trajectories, prompt)

    return measure_with


def _list_sources(
    config: RewardConfig, stage: str = "align"
) -> dict[str, tuple[str, str, Path | None, Mapping[str, Any]]]:
    """Place in the recipe, source, model and options of each."""
    if not config.parts:
        return {ONLY: (f"{stage}.reward", config.source, config.model, config.options)}
    return {
        name: (f"{stage}.reward.parts.{name}", part.source, part.model, part.options)
        for name, part in config.parts.items()
    }
