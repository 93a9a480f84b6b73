"""Knobs of shards: which documents are read how often, and how they are laid into rows."""

from __future__ import annotations

from pydantic import Field

from raylign.config.section import Section


class MixtureConfig(Section):
    """How much of each domain the shards hold."""

    weights: dict[str, float] = Field(default_factory=dict)
    """Domain to its share of the tokens, relative to the others'."""
