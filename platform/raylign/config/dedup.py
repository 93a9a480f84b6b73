"""Knobs of duplicate removal."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from raylign.config.section import Count, Section, Share


class LinesConfig(Section):
    """Removal of lines or paragraphs that many documents share: menus, footers, licence texts."""

    unit: Literal["line", "paragraph"] = "line"
    """What is compared; paragraphs stand between empty lines."""
    min_chars: Count = 20
    """Shorter ones are left alone (bytes that are not white space)."""
    documents: int = Field(default=6, ge=2)
    """A line in at least so many documents stays in the preferred one only."""


class SubstringConfig(Section):
    """Removal of passages that occur word for word in another document (Lee et al. 2022)."""

    words: int = Field(default=50, ge=8)
    """Shortest passage, in words."""


class DedupConfig(Section):
    """Exact and near-duplicate removal (MinHash-LSH)."""

    ngram: Count = 5
    """Words in a shingle."""
    bands: Count = 14
    """LSH bands."""
    rows: Count = 8
    """Hashes in a band."""
    threshold: Share = 0.7
    """A document goes only if a kept one has at least this estimated Jaccard similarity."""
    keep: Literal["longest", "first", "oldest", "best"] = "longest"
    """Which of several similar documents stays: `first` in the order of sources, `oldest` by date,
    `best` by the score of `signals.classifier`. Ties go to the first."""
    against: tuple[Path, ...] = ()
    """Finished runs whose corpora are compared as well: what they kept stays, what resembles it
    goes. Their signatures are used as they are."""
    lines: LinesConfig | None = None
    """Lines that many documents share; left alone when not given."""
    substring: SubstringConfig | None = None
    """Passages that occur elsewhere; left alone when not given."""
