"""Knobs of `synthesise` and `classifier`: documents written and judged by a model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from raylign.config.alignment import RolloutConfig, SamplingConfig
from raylign.config.section import Count, Section, Share

# A document takes longer than a short answer; one worker is the least that works.
WRITERS = RolloutConfig(count=1, cpus=1.0, deadline_s=900.0)


class StyleConfig(Section):
    """A way of writing. Templates name the fields `{topic}`, `{audience}` and `{seed}`; a literal
    brace is doubled."""

    name: str = Field(pattern=r"^[\w-]+$")
    """Kept in the provenance of every document."""
    instruction: str | None = None
    """What a model with a chat template is asked."""
    completion: str | None = None
    """The beginning of a text that a model without one goes on with."""
    share: float = Field(default=1.0, gt=0)
    """Prompts of this style, in proportion to the shares of the others."""
    answer: Literal["prose", "questions", "worked", "python"] = "prose"
    """What the output must look like: `questions` has questions each with an answer, `worked` an
    exercise and its solution, `python` code that parses and defines a documented function."""


class OutputFilterConfig(Section):
    """What an output must be like; a rejected one is kept apart with all its reasons."""

    finished: bool = True
    """Reject what was cut off at `sampling.max_tokens`."""
    min_chars: int = Field(default=200, ge=0)
    """Shorter outputs are rejected."""
    max_chars: Count = 50_000
    """Longer outputs are rejected."""
    openers: bool = True
    """Reject refusals and talk about the task ("As an AI", "Sure, here is")."""
    max_line_repeat_share: Share = 0.3
    """Largest share of lines that repeat an earlier line."""
    max_ngram_repeat_share: Share = 0.2
    """Largest share of word 5-grams that occurred earlier in the same output."""
    max_prompt_share: Share = 0.4
    """Largest share of word 8-grams that are taken from the prompt."""
    answers: bool = True
    """Check what each style says its outputs look like."""
    duplicates: bool = True
    """Reject exact copies of earlier outputs, without regard to case and white space."""


class SynthesiseConfig(Section):
    """`python -m jobs.synthesise`: textbook pages and exercises written by a model."""

    model: Path | None = None
    """Directory of the model that writes, with its tokenizer. Required."""
    seeds: Path | None = None
    """Documents that excerpts are shown from: a `corpus` stage or a directory of Parquet files."""
    seed_documents: Count = 1000
    """Documents drawn from `seeds`."""
    seed_chars: Count = 1200
    """Longest excerpt."""
    topics: tuple[str, ...] | Path = ()
    """What to write about: a list, or a file with one topic a line."""
    audiences: tuple[str, ...] | Path = ("secondary school pupils", "university students")
    """Whom to write for: a list, or a file with one audience a line."""
    styles: tuple[str | StyleConfig, ...] = Field(
        default=("textbook", "exercise", "questions", "story"), min_length=1
    )
    """Names of built-in styles (also `python`), or styles of your own."""
    prompting: Literal["auto", "chat", "completion"] = "auto"
    """`auto` asks through the chat template where the tokenizer has one."""
    prompts: Count = 1000
    """Different prompts, drawn without replacement."""
    samples: Count = 1
    """Outputs a prompt."""
    target: int | None = Field(default=None, ge=1)
    """Stop as soon as so many outputs are accepted; all prompts are used when not given."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.8, top_p=0.95, max_tokens=1024)
    filters: OutputFilterConfig = OutputFilterConfig()
    rollout: RolloutConfig = WRITERS
    """Workers that serve the model."""
    max_length: Count = 4096
    """Longest prompt and output together; a model with a shorter context uses its own."""
    part_samples: Count = 1000
    """Outputs in one part of the stage."""
    cache: Path | None = None
    """Directory of the answers already paid for; `.synthetic.cache` in the run when not given."""


class JudgeConfig(Section):
    """A model that scores documents for the classifier to learn from."""

    model: Path
    """Directory of the model that judges, with its tokenizer."""
    documents: Path | None = None
    """Documents to judge; the run's `documents` stage, else its `corpus`, when not given."""
    sample: Count = 2000
    """Documents judged."""
    excerpt_chars: Count = 3000
    """How much of each document is shown, from its beginning."""
    rubric: Path | None = None
    """Text file with a rubric of your own for scores 0 to 5; the built-in one is educational."""
    attempts: Count = 3
    """Answers asked for before a document without a readable score is left out."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.4, max_tokens=256)
    rollout: RolloutConfig = WRITERS
    """Workers that serve the model."""
    max_length: Count = 4096
    """Longest prompt and answer together; a model with a shorter context uses its own."""
    cache: Path | None = None
    """Directory of the answers already paid for; `.classifier.cache` in the run when not given."""


class FitConfig(Section):
    """How the classifier is fitted."""

    bits: int = Field(default=18, ge=8, le=24)
    """Words and pairs of words are hashed into 2^bits weights."""
    ngrams: Literal[1, 2] = 2
    """1: words; 2: words and pairs of neighbouring words."""
    frequency: Literal["log", "binary"] = "log"
    """What a repeated word counts: 1 + ln(count), or 1."""
    ridge: float = Field(default=1.0, gt=0)
    """Weight of the squared coefficients (ridge regression)."""
    embedding_model: Path | None = None
    """Regress on the mean-pooled output of this Hugging Face encoder instead of on words."""
    embedding_tokens: Count = 512
    """Tokens of a document that the encoder sees."""
    score_range: tuple[float, float] = (0.0, 5.0)
    """Lowest and highest label; scores are clipped to it."""
    threshold: float = 3.0
    """Score from which a document counts as good in the reported precision, recall and F1."""
    calibration_share: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of the labels that the scale of the scores is set on."""
    held_out_share: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of the labels that the reported quality is measured on."""


class ClassifierConfig(Section):
    """`python -m jobs.classifier`: a quality classifier fitted from labelled documents."""

    labels: Path | None = None
    """JSON lines or Parquet (file or directory) of labelled documents."""
    text_column: str = "text"
    """Column of `labels` with the text."""
    score_column: str = "score"
    """Column of `labels` with the score."""
    judge: JudgeConfig | None = None
    """Let a model label documents; instead of `labels`."""
    fit: FitConfig = FitConfig()
