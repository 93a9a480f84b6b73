"""How well a tokenizer spells text that it was not trained on, beside two plain baselines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

_WORD = re.compile(r"\s+|\w+|[^\w\s]+")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One tokenizer on one sample."""

    name: str
    vocab_size: int
    bytes_per_token: float
    """UTF-8 bytes of the sample per token: higher is shorter."""
    unknown_rate: float
    """Tokens that stand for something the vocabulary lacks."""
    round_trip: float
    """Share of the texts that decoding gives back exactly."""


@dataclass(frozen=True, slots=True)
class _Speller:
    """A baseline: the most frequent pieces of the training text, and one token for all others."""

    split: Callable[[str], list[str]]
    known: frozenset[str]

    def unknown(self, pieces: Sequence[str]) -> int:
        return sum(piece not in self.known for piece in pieces)


def compare(
    tokenizer: PreTrainedTokenizerBase, training: Iterable[str], sample: Sequence[str]
) -> list[Comparison]:
    """`tokenizer` beside character-level and word-level vocabularies of the same size.

    The baselines learn from `training`; all are measured on `sample`. Raises `ValueError` for an
    empty sample.
    """
    if not any(sample):
        raise ValueError("a comparison needs a sample of text")
    size = len(tokenizer)
    characters: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for text in training:
        characters.update(text)
        words.update(_WORD.findall(text))
    return [
        _measure_tokenizer(tokenizer, sample),
        _measure_baseline("characters", _learn(list, characters, size), sample),
        _measure_baseline("words", _learn(_WORD.findall, words, size), sample),
    ]


def _learn(split: Callable[[str], list[str]], counts: Counter[str], size: int) -> _Speller:
    """The `size - 1` most frequent pieces; equally frequent ones in alphabetical order."""
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
    return _Speller(split, frozenset(ranked[: size - 1]))


def _measure_tokenizer(tokenizer: PreTrainedTokenizerBase, sample: Sequence[str]) -> Comparison:
    tokens = unknown = restored = 0
    for text in sample:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens += len(ids)
        if tokenizer.unk_token_id is not None:
            unknown += ids.count(tokenizer.unk_token_id)
        restored += tokenizer.decode(ids) == text
    return _describe("bpe", len(tokenizer), sample, tokens, unknown, restored)


def _measure_baseline(name: str, speller: _Speller, sample: Sequence[str]) -> Comparison:
    tokens = unknown = restored = 0
    for text in sample:
        pieces = speller.split(text)
        missing = speller.unknown(pieces)
        tokens, unknown, restored = (
            tokens + len(pieces),
            unknown + missing,
            restored + (not missing),
        )
    return _describe(name, len(speller.known) + 1, sample, tokens, unknown, restored)


def _describe(
    name: str, size: int, sample: Sequence[str], tokens: int, unknown: int, restored: int
) -> Comparison:
    total = sum(len(text.encode()) for text in sample)
    return Comparison(
        name=name,
        vocab_size=size,
        bytes_per_token=round(total / max(1, tokens), 4),
        unknown_rate=round(unknown / max(1, tokens), 6),
        round_trip=round(restored / len(sample), 4),
    )
