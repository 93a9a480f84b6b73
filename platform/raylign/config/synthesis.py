"""Knobs of `synthesise` and `classifier`: documents written and judged by a model."""

from __future__ import annotations

from pathlib import Path

from raylign.config.section import Section


class SynthesiseConfig(Section):
    """`python -m jobs.synthesise`: textbook pages and exercises written by a model."""

    model: Path | None = None
    """Model directory."""


class ClassifierConfig(Section):
    """`python -m jobs.classifier`: a quality classifier fitted from labelled documents."""

    labels: Path | None = None
    """Labelled documents."""
