"""From the name in a recipe to the function that scores."""

from __future__ import annotations

import difflib
import importlib
import inspect
from operator import attrgetter
from typing import Any

from raylign.config import UserError
from raylign.rewards.verifiers import VERIFIERS, RewardFunction


def load_reward(source: str) -> RewardFunction:
    """The verifier called `source`, or what `module:function` names.

    Raises `UserError` for an unknown name, a module or attribute that is not there, or one that
    cannot be called with (completion, reference). Other errors of the module itself pass through.
    """
    if ":" in source:
        return _import(source)
    if source in VERIFIERS:
        return VERIFIERS[source]
    close = difflib.get_close_matches(source.lower(), VERIFIERS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(
        f"align.reward.source={source!r}: unknown verifier; {hint}"
        f"choose from {', '.join(VERIFIERS)}, or give module:function"
    )


def _import(source: str) -> RewardFunction:
    place = f"align.reward.source={source!r}"
    module_name, _, attribute = source.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise UserError(f"{place}: expected module:function, such as my_rewards:score")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            remedy = "run from its directory, or put it on PYTHONPATH"
        else:
            remedy = f"{module_name} itself imports it; install it"
        raise UserError(f"{place}: no module named {error.name!r}; {remedy}") from None
    try:
        function = attrgetter(attribute)(module)
    except AttributeError:
        close = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{place}: {module_name} has no {attribute!r}{hint}") from None
    _check_callable(function, place)
    return function


def _check_callable(function: Any, place: str) -> None:
    if not callable(function):
        raise UserError(f"{place}: is of type {type(function).__name__}; name a function")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none to check
        return
    try:
        signature.bind("completion", "reference")
    except TypeError:
        raise UserError(
            f"{place}: takes {signature}; it must take (completion, reference), two strings"
        ) from None
