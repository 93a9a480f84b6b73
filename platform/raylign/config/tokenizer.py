"""Knobs of `tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from raylign.config.section import Count, Section

Kind = Literal["bpe", "unigram", "word", "char"]
TIKTOKEN = "tiktoken:"
"""Prefix of `load` that names an encoding of tiktoken, or a file of its ranks."""


class VocabularyConfig(Section):
    """Where the entries of one tokenizer come from: training, or elsewhere."""

    kind: Kind = "bpe"
    """`bpe`: byte-level pairs (nothing is unknown); `unigram`: the likeliest pieces (Kudo 2018);
    `word`: whole words, and `<unk>`; `char`: single characters."""
    vocab_size: Count | None = None
    """Entries, special tokens included; 1024 when not given, and for `char` as many as the text has
    characters."""
    min_frequency: Count = 1
    """Pairs, words or characters that the sample holds less often get no entry."""
    byte_fallback: bool | None = None
    """`unigram` and `char`: spell what the vocabulary lacks in bytes (256 entries) in place of
    `<unk>`. `unigram` does when not given, `char` does not; `bpe` always consists of bytes."""
    digits: Literal["single", "grouped"] = "single"
    """Numbers digit by digit, so that those of any length are spelt alike, or like words."""
    load: str | None = None
    """In place of training: a directory with a tokenizer, a name on the Hugging Face hub,
    `tiktoken:gpt2` (or another of its encodings), or a file of tiktoken's ranks (*.tiktoken)."""
    pattern: Literal["gpt2", "cl100k", "o200k"] | None = None
    """How a file of ranks, which does not say, cuts text into words; `cl100k` when not given."""

    @model_validator(mode="after")
    def _check_vocabulary(self) -> Self:
        ranks = self.load is not None and self.load.endswith(".tiktoken")
        if self.pattern is not None and not ranks:
            raise ValueError("`pattern` belongs to `load` of a *.tiktoken file")
        if self.load is not None:
            trained = ("kind", "vocab_size", "min_frequency", "byte_fallback", "digits")
            fields = VocabularyConfig.model_fields
            said = [key for key in trained if getattr(self, key) != fields[key].default]
            if said:
                raise ValueError(f"`{said[0]}` has no effect on a tokenizer that `load` names")
            if not self.load.removeprefix(TIKTOKEN):
                raise ValueError("`load` names nothing")
        if self.byte_fallback is not None and self.kind in ("bpe", "word"):
            raise ValueError(f"`byte_fallback` is for unigram and char, not for {self.kind}")
        if self.kind == "unigram" and self.min_frequency > 1:
            raise ValueError("`min_frequency` has no meaning for unigram, which weighs pieces")
        if self.kind == "char" and self.digits != "single":
            raise ValueError("`digits` are single characters for char")
        return self

    @property
    def falls_back(self) -> bool:
        """Whether unknown characters are spelt in bytes by entries of their own."""
        return self.kind == "unigram" if self.byte_fallback is None else self.byte_fallback


class TokenizerConfig(VocabularyConfig):
    """`python -m jobs.tokenizer`: a tokenizer with a chat template, and how it compares."""

    corpus: Path | None = None
    """Directory of documents; the run's own `corpus` stage when not given."""
    sample_documents: Count = 20_000
    """Documents of the corpus that are drawn; training sees all but the few held out."""
    sample_bytes: Count | None = None
    """Draw no more documents once they hold so many bytes of UTF-8."""
    tags: tuple[str, ...] = ("<work>", "</work>", "<answer>", "</answer>")
    """Markup that becomes one token each (ordinary tokens: decoding shows them)."""
    chat_template: Path | None = None
    """Jinja file; a plain user/assistant template when not given, unless a loaded tokenizer has
    one."""
    compare: tuple[VocabularyConfig, ...] = ()
    """Further tokenizers to compare with, of the same size when they name none."""
    compare_sizes: tuple[Count, ...] = ()
    """Vocabulary sizes at which every trained bpe, unigram and word tokenizer is measured."""
    paragraph: str | None = Field(default=None, min_length=1)
    """Text shown in the tokens of each; the beginning of a document when not given."""
    hidden_size: Count = 768
    """Width of the model that the cost of the embedding is computed for."""
    layers: Count = 12
    """Its layers, of about 12 hidden_size^2 parameters each (Kaplan et al. 2020)."""

    @model_validator(mode="after")
    def _check_comparison(self) -> Self:
        if len(set(self.tags)) < len(self.tags) or not all(tag.strip() for tag in self.tags):
            raise ValueError("`tags` must differ from each other and not be blank")
        if len(set(self.compare_sizes)) < len(self.compare_sizes):
            raise ValueError("`compare_sizes` names a size twice")
        every: list[VocabularyConfig] = [self, *self.compare]
        trained = [v for v in every if v.load is None and v.kind != "char"]
        if self.compare_sizes and not trained:
            raise ValueError("`compare_sizes` needs a bpe, unigram or word tokenizer to train")
        return self
