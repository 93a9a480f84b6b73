"""Knobs of decontamination."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raylign.config.section import Section


class DecontaminateConfig(Section):
    """Removal of evaluation items from documents."""

    ngram: int = Field(default=13, ge=2)
    """Words in a matching n-gram; shorter items are matched whole."""
    granularity: Literal["line", "document"] = "line"
    """What goes: the lines that an item touches (and documents that lose half of their text so),
    or the whole document."""
