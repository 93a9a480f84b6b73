"""A user's own code, named by import path in a recipe."""

from __future__ import annotations

import difflib
import importlib
from operator import attrgetter
from typing import Any

from raylign.config import UserError


def import_object(source: str, place: str, noun: str, example: str) -> Any:
    """What `module:noun` names. `place` is the key and value of the recipe, for messages.

    Raises `UserError` for another form, or a module or attribute that is not there, with what comes
    close. Other errors of the module itself pass through.
    """
    module_name, _, attribute = source.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise UserError(f"{place}: expected module:{noun}, such as {example}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            remedy = "run from its directory, or put it on PYTHONPATH"
        else:
            remedy = f"{module_name} itself imports it; install it"
        raise UserError(f"{place}: no module named {error.name!r}; {remedy}") from None
    try:
        return attrgetter(attribute)(module)
    except AttributeError:
        close = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{place}: {module_name} has no {attribute!r}{hint}") from None
