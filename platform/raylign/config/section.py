"""The base of every configuration section, and the error that users are shown."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]

_NUMBERS = (int, float, int | None, float | None)


class UserError(Exception):
    """Something the user can put right: one line that says what, where, and the remedy.

    Jobs print it without a traceback and exit with status 2.
    """


class Section(BaseModel):
    """Frozen, typed, and closed: an unknown key is an error, never ignored.

    Where a section sets defaults of its own for one inside it (`align.optimizer` has no weight
    decay), those hold for every key that a recipe leaves out.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_value(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, dict) and isinstance(field.default, Section):
            return _complete(value, field.default)
        # YAML reads `yes` and `on` as true, which would quietly become 1.
        if isinstance(value, bool) and field.annotation in _NUMBERS:
            raise ValueError("input should be a number, not true or false")
        return value


def _complete(given: dict[str, Any], default: Section) -> dict[str, Any]:
    """`given`, with what `default` sets explicitly where it is silent."""
    complete = {name: getattr(default, name) for name in default.model_fields_set}
    for name, value in given.items():
        preset = complete.get(name)
        if isinstance(value, dict) and isinstance(preset, Section):
            value = _complete(value, preset)
        complete[name] = value
    return complete
