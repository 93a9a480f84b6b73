"""Knobs of decontamination."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from raylign.config.section import Count, Section, Share


class EvaluationSetConfig(Section):
    """An evaluation set whose items documents may not contain."""

    task: str = Field(min_length=1)
    """Name in reports; those of lm-eval (gsm8k, humaneval, mmlu, ...) know their columns."""
    path: Path
    """File (jsonl, json, csv or parquet; all but the last also gzipped), or directory of them."""
    texts: Literal["question", "answer", "both"] = "question"
    """Which texts of a known task count: what is asked, what may be answered, or both."""
    columns: tuple[str, ...] = ()
    """Columns that count, instead of the known ones; `a.b` is `b` inside `a`, and a number is the
    place of a column in a csv file without header."""


class DecontaminateConfig(Section):
    """Removal of evaluation items from documents."""

    ngram: int = Field(default=13, ge=2)
    """Words in a matching n-gram (GPT-3: 13; Tulu 3 and Llama 3: 8); shorter items match whole."""
    granularity: Literal["line", "document"] = "line"
    """What goes: the lines that an item touches (and documents that lose half of their text so),
    or the whole document."""
    against: tuple[EvaluationSetConfig, ...] = ()
    """Evaluation sets, besides the run's own held-out problems and texts."""
    method: Literal["ngram", "coverage"] = "ngram"
    """When a document holds an item of an evaluation set: it shares one n-gram with it (GPT-3), or
    the shared n-grams cover `min_coverage` of the item's words (Tulu 3). One n-gram is always
    enough for the run's own held-out problems and texts."""
    min_coverage: Share = 0.5
    """For `coverage`: share of an item's words (Tulu 3: 0.5; Llama 2 calls 0.8 and more dirty)."""
    min_words: int = Field(default=8, ge=2)
    """Evaluation items of fewer words are not looked for, but counted and listed (GPT-3: 8)."""
    window: int = Field(default=0, ge=0)
    """For `line`: bytes of text on either side of an occurrence whose lines go too (GPT-3: 200)."""
    max_occurrences: Count | None = None
    """Ignore n-grams of evaluation sets that more documents contain: boilerplate (GPT-3: 10)."""
