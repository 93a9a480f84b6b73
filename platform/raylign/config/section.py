"""The base of every configuration section, and the error that users are shown."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class UserError(Exception):
    """Something the user can put right: one line that says what, where, and the remedy.

    Jobs print it without a traceback and exit with status 2.
    """


class Section(BaseModel):
    """Frozen, typed, and closed: an unknown key is an error, never ignored."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )
