"""From the name in a recipe to a factory of environments."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from raylign.config import UserError
from raylign.environments.calculator import Calculator
from raylign.environments.environment import Environment
from raylign.imports import import_object

ENVIRONMENTS: dict[str, Callable[..., Environment]] = {"calculator": Calculator}
PLACE = "align.environment"


def load_environment(
    source: str, options: Mapping[str, Any], place: str = PLACE
) -> Callable[[], Environment]:
    """Makes an environment for each episode: the one called `source`, or what the factory that
    `module:factory` names makes of `options`. `place`: the section of the recipe that says so.

    Raises `UserError` for an unknown name, a module or attribute that is not there, options that
    the factory does not take, or something made that has no `reset` and `step`.
    """
    factory = _import(source, place) if ":" in source else _look_up(source, place)

    def make() -> Environment:
        return factory(**options)

    try:
        made = make()
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}.options: {source} does not take them ({error})") from None
    for method in ("reset", "step"):
        if not callable(getattr(made, method, None)):
            raise UserError(
                f"{place}.source={source!r}: it makes a {type(made).__name__}, which has no "
                f"{method}(); see raylign.environments.environment"
            )
    return make


def _look_up(source: str, place: str) -> Callable[..., Environment]:
    if source in ENVIRONMENTS:
        return ENVIRONMENTS[source]
    close = difflib.get_close_matches(source.lower(), ENVIRONMENTS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(
        f"{place}.source={source!r}: unknown environment; {hint}"
        f"choose from {', '.join(ENVIRONMENTS)}, or give module:factory"
    )


def _import(source: str, place: str) -> Callable[..., Environment]:
    key = f"{place}.source={source!r}"
    factory: Callable[..., Environment] = import_object(source, key, "factory", "my_tools:Search")
    if not callable(factory):
        raise UserError(f"{key}: is of type {type(factory).__name__}; name a class or function")
    return factory
