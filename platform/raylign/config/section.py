"""The base of every configuration section, and the error that users are shown."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class UserError(Exception):
    """Something the user can put right: one line that says what, where, and the remedy.

    Jobs print it without a traceback and exit with status 2.
    """


class Section(BaseModel):
    """Frozen, typed, and closed: an unknown key is an error, never ignored."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_switch_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `yes` and `on` as true, which would quietly become 1.
        wanted = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and wanted in (int, float):
            raise ValueError("input should be a number, not true or false")
        return value
