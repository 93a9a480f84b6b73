"""From the name in a recipe to the function that scores."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from raylign.config import SandboxConfig, UserError
from raylign.imports import import_object
from raylign.records import Trajectory
from raylign.rewards.verifiers import (
    RewardFunction,
    build_choice,
    build_exact,
    build_format,
    build_numeric,
    build_regex,
    verify_arithmetic,
    verify_number,
)

MATH_SECONDS = 5.0
"""Of processor time to compare one answer with its reference, unless an option says otherwise."""

_KINDS = {"bool": bool, "int": int, "float": (int, float), "str": str}


def _build_arithmetic() -> RewardFunction:
    return verify_arithmetic


def _build_number() -> RewardFunction:
    return verify_number


def _build_environment() -> RewardFunction:
    return take_environment_reward


def _build_math(*, seconds: float = MATH_SECONDS) -> RewardFunction:
    from raylign.rewards.symbolic import MathVerifier  # needs a package that is optional

    return MathVerifier(seconds)


def _build_code(
    sandbox: SandboxConfig, *, packages: bool = False, tolerance: float = 1e-6
) -> RewardFunction:
    from raylign.rewards.programs import CodeVerifier

    return CodeVerifier(sandbox, packages, tolerance)


# Each is called with its options by keyword; what a completion is held to stands in the docstring
# of what it returns.
VERIFIERS: dict[str, Callable[..., RewardFunction]] = {
    "arithmetic": _build_arithmetic,
    "number": _build_number,
    "numeric": build_numeric,
    "math": _build_math,
    "exact": build_exact,
    "choice": build_choice,
    "regex": build_regex,
    "format": build_format,
    "code": _build_code,
    "environment": _build_environment,
}


def take_environment_reward(
    completion: str, reference: str, *, trajectory: Trajectory
) -> dict[str, float]:
    """What the environment gave during the episode; raises `ValueError` where it gave nothing."""
    if trajectory.environment_reward is None:
        raise ValueError("the environment gave no reward")
    return {"score": trajectory.environment_reward}


def load_reward(
    source: str,
    options: Mapping[str, Any] | None = None,
    sandbox: SandboxConfig | None = None,
    place: str = "align.reward",
) -> RewardFunction:
    """The verifier called `source`, or what `module:function` names, with `options` by keyword.

    Raises `UserError`, which names the recipe's section `place`, for an unknown name or option, a
    missing one, a module or attribute that is not there, a function that cannot be called with
    (completion, reference), and a kernel that cannot confine `code`. Other errors of the module
    itself pass through.
    """
    options = options or {}
    key = f"{place}.source={source!r}"
    if ":" in source:
        function = import_object(source, key, "function", "my_rewards:score")
        _check_callable(function, key, options)
        return functools.partial(function, **options) if options else function
    if source not in VERIFIERS:
        raise UserError(
            f"{key}: unknown verifier; {_suggest(source.lower(), VERIFIERS)}"
            f"choose from {', '.join(VERIFIERS)}, or give module:function"
        )
    build = VERIFIERS[source]
    _check_options(source, build, options, place)
    arguments = [sandbox or SandboxConfig()] if source == "code" else []
    try:
        return build(*arguments, **options)
    except UserError as error:
        raise UserError(str(error).replace("align.reward.source=", f"{place}.source=")) from None


def _check_options(
    source: str, build: Callable[..., RewardFunction], options: Mapping[str, Any], place: str
) -> None:
    known = {
        name: parameter
        for name, parameter in inspect.signature(build).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name, value in options.items():
        if name not in known:
            choice = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(
                f"{place}.options.{name}: {source} has no such option; "
                f"{_suggest(name, known)}{choice}"
            )
        kind = str(known[name].annotation)
        right = isinstance(value, _KINDS[kind])  # type: ignore[arg-type]
        if not right or (isinstance(value, bool) and kind != "bool"):
            raise UserError(f"{place}.options.{name}={value!r}: give a value of type {kind}")
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise UserError(
                f"{place}.source={source!r} needs the option {name}; give {place}.options.{name}"
            )


def _suggest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}? " if close else ""


def _check_callable(function: Any, place: str, options: Mapping[str, Any]) -> None:
    if not callable(function):
        raise UserError(f"{place}: is of type {type(function).__name__}; name a function")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none to check
        return
    extras = {
        name: name
        for name in ("prompt", "trajectory")
        if name in signature.parameters
        and signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    }
    try:
        signature.bind("completion", "reference", **(extras | dict(options)))
    except TypeError as error:
        taken = f" with options {', '.join(options)} ({error})" if options else ""
        raise UserError(
            f"{place}: takes {signature}; it must take (completion, reference), two strings{taken},"
            " and by keyword prompt or trajectory where it wants them"
        ) from None
