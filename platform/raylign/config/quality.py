"""Knobs of quality: what is measured, and what is judged."""

from __future__ import annotations

from pydantic import Field

from raylign.config.section import Section, Share


class QualityConfig(Section):
    """Heuristic filters; every rejected document keeps all its reasons."""

    min_chars: int = Field(default=80, ge=0)
    """Shorter documents are dropped."""
    max_chars: int = Field(default=100_000, ge=1)
    """Longer documents are dropped."""
    min_alpha_share: Share = 0.2
    """Least share of letters and digits among non-space characters."""
    max_line_repeat_share: Share = 0.5
    """Largest share of lines that repeat an earlier line."""
    max_mean_word_chars: float = Field(default=15.0, gt=0)
    """Longest mean word length."""


class SignalsConfig(Section):
    """What is measured of every document, once."""

    language: bool = True
    """Identify the language."""


class PiiConfig(Section):
    """Personal data that is replaced in the documents that are kept."""

    mails: bool = False
    """Replace e-mail addresses."""
