"""From the name in a recipe to a factory of environments."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

from raylign.config import UserError
from raylign.environments.calculator import Calculator
from raylign.environments.environment import Environment

ENVIRONMENTS: dict[str, Callable[..., Environment]] = {"calculator": Calculator}
PLACE = "align.environment"


def load_environment(source: str, options: Mapping[str, Any]) -> Callable[[], Environment]:
    """Makes an environment for each episode: the one called `source`, or what the factory that
    `module:factory` names makes of `options`.

    Raises `UserError` for an unknown name, a module or attribute that is not there, options that
    the factory does not take, or something made that has no `reset` and `step`.
    """
    factory = _import(source) if ":" in source else _look_up(source)

    def make() -> Environment:
        return factory(**options)

    try:
        made = make()
    except (TypeError, ValueError) as error:
        raise UserError(f"{PLACE}.options: {source} does not take them ({error})") from None
    for method in ("reset", "step"):
        if not callable(getattr(made, method, None)):
            raise UserError(
                f"{PLACE}.source={source!r}: it makes a {type(made).__name__}, which has no "
                f"{method}(); see raylign.environments.environment"
            )
    return make


def _look_up(source: str) -> Callable[..., Environment]:
    if source in ENVIRONMENTS:
        return ENVIRONMENTS[source]
    close = difflib.get_close_matches(source.lower(), ENVIRONMENTS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(
        f"{PLACE}.source={source!r}: unknown environment; {hint}"
        f"choose from {', '.join(ENVIRONMENTS)}, or give module:factory"
    )


def _import(source: str) -> Callable[..., Environment]:
    place = f"{PLACE}.source={source!r}"
    module_name, _, attribute = source.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise UserError(f"{place}: expected module:factory, such as my_tools:Search")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{place}: no module named {error.name!r}; run from its directory, or put it on "
            "PYTHONPATH"
        ) from None
    try:
        factory: Callable[..., Environment] = attrgetter(attribute)(module)
    except AttributeError:
        close = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{place}: {module_name} has no {attribute!r}{hint}") from None
    if not callable(factory):
        raise UserError(f"{place}: is of type {type(factory).__name__}; name a class or function")
    return factory
