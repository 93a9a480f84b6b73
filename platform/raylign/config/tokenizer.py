"""Knobs of `tokenizer`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from raylign.config.section import Count, Section


class TokenizerConfig(Section):
    """`python -m jobs.tokenizer`: a byte-level BPE with a chat template."""

    corpus: Path | None = None
    """Directory of documents; the run's own `corpus` stage when not given."""
    vocab_size: int = Field(default=1024, ge=270)
    """Entries, special tokens included."""
    sample_documents: Count = 20_000
    """Documents of the corpus that training sees."""
    tags: tuple[str, ...] = ("<work>", "</work>", "<answer>", "</answer>")
    """Markup that becomes one token each (ordinary tokens: decoding shows them)."""
    chat_template: Path | None = None
    """Jinja file; a plain user/assistant template when not given."""
