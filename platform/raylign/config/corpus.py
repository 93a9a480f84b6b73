"""Knobs of `prepare` and `tokenizer`: from raw text to packed token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from raylign.config.section import Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


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


class TextbookConfig(Section):
    """The generated arithmetic textbook, its exercises and the held-out problems."""

    pages: int = Field(default=6000, ge=0)
    """Pages of the textbook."""
    max_digits: int = Field(default=3, ge=1, le=6)
    """Digits of the largest operand."""
    worked_share: Share = 0.85
    """Share of textbook lines that are worked examples."""
    exercises: int = Field(default=16000, ge=0)
    """Chat demonstrations for supervised fine-tuning."""
    exercise_worked_share: tuple[Share, ...] = (0.9, 0.75, 0.25)
    """Share of demonstrations that show their working, by digits of the larger operand; the last
    entry serves all longer ones."""
    prompts: int = Field(default=4000, ge=0)
    """Questions for reinforcement learning."""
    held_out: Count = 600
    """Problems kept out of everything above, for evaluation."""


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


class DecontaminateConfig(Section):
    """Removal of evaluation items from documents."""

    ngram: int = Field(default=13, ge=2)
    """Words in a matching n-gram; shorter items are matched whole."""
    granularity: Literal["line", "document"] = "line"
    """What goes: the lines that an item touches (and documents that lose half of their text so),
    or the whole document."""


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
    quality: QualityConfig = QualityConfig()
    """Heuristic filters."""
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
    validation_share: Share = 0.02
    """Share of packed rows kept for validation loss."""


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
