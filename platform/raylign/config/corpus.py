"""Knobs of `prepare`: from raw text to packed token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from raylign.config.decontamination import DecontaminateConfig
from raylign.config.dedup import DedupConfig
from raylign.config.quality import PiiConfig, QualityConfig, SignalsConfig
from raylign.config.section import Count, Section, Share
from raylign.config.shards import MixtureConfig
from raylign.config.sources import SourceConfig
from raylign.config.textbook import TextbookConfig


class PrepareConfig(Section):
    """`python -m jobs.prepare`: sources to packed shards, demonstrations and prompts."""

    sources: tuple[SourceConfig, ...] = Field(
        default=(
            SourceConfig(kind="pydoc"),
            SourceConfig(kind="docstrings"),
            SourceConfig(kind="textbook"),
        ),
        min_length=1,
    )
    """Where documents come from."""
    textbook: TextbookConfig = TextbookConfig()
    """What the arithmetic generator writes."""
    max_damaged_share: Share = 0.1
    """Stop when more than this share of a source's records cannot be read."""
    signals: SignalsConfig = SignalsConfig()
    """What is measured of every document, once."""
    quality: QualityConfig = QualityConfig()
    """Heuristic filters: thresholds on what was measured."""
    pii: PiiConfig = PiiConfig()
    """Personal data replaced in kept documents."""
    dedup: DedupConfig = DedupConfig()
    """Duplicate removal."""
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    """Protection of the held-out problems and texts."""
    english_held_out_share: Share = 0.02
    """Share of the documents outside the textbook that are kept for evaluation."""
    tokenizer: Path | None = None
    """Tokenizer directory; the run's own `tokenizer` stage when not given, trained if missing."""
    sequence_length: int = Field(default=256, ge=8)
    """Tokens in a packed row."""
    shard_rows: Count = 2048
    """Packed rows in a shard."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """`concatenate`: one stream, cut where a row is full; `best_fit`: no document is cut that fits
    a row, and the room that is left is padding."""
    validation_share: Share = 0.02
    """Share of the tokens kept for validation loss, in whole documents."""
    mixture: MixtureConfig | None = None
    """How much of each domain the shards hold; every document once when not given."""
