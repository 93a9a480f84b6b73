"""Knobs of sources: where documents come from, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from raylign.config.section import Section


class SourceConfig(Section):
    """One place that documents come from."""

    kind: Literal["pydoc", "docstrings", "textbook", "jsonl", "parquet", "text"]
    """`pydoc` and `docstrings` read what ships with Python; `textbook` is generated."""
    path: Path | None = None
    """File or directory, for `jsonl`, `parquet` and `text`."""
    text_column: str = "text"
    """Column holding the text, for `jsonl` and `parquet`."""
    limit: int | None = Field(default=None, ge=1)
    """Take at most so many documents."""
