"""How tokenizers spell text that none of them was trained on: overall, by domain, by language.

Text is read as shards are made: markup that spells a special token is text.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer, trainers
from transformers import PreTrainedTokenizerFast

from raylign.tokenization.lexicon import build_character_speller, build_word_speller, rank
from raylign.tokenization.sample import Excerpt
from raylign.tokenization.special import UNKNOWN

_WORD = re.compile(r"\w+")
MEASURED_CHARACTERS = 200_000
"""Of each document, so that a single long one does not speak for all."""
BATCH = 16


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A tokenizer to be measured."""

    name: str
    size: int
    """Entries."""
    unknown: int | None
    """Id that stands for what the vocabulary lacks."""
    tokenizer: Tokenizer
    bytewise: bool
    """Its tokens are written in the characters that stand for bytes (GPT-2)."""


@dataclass(frozen=True, slots=True)
class Scores:
    """One tokenizer on some documents."""

    documents: int
    tokens: int
    bytes_per_token: float
    """UTF-8 bytes per token: higher is shorter."""
    characters_per_token: float
    fertility: float
    """Tokens per word between blanks (Rust et al. 2021): 1 at best, as a rule."""
    unknown_rate: float
    """Tokens that stand for something the vocabulary lacks."""
    round_trip: float
    """Share of the documents that decoding gives back exactly."""
    single_token_share: float
    """Of the words (runs of letters and digits), those that are one token."""
    vocabulary_use: float
    """Share of the entries that occur."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One tokenizer on the sample."""

    name: str
    vocab_size: int
    scores: Scores
    domains: dict[str, Scores]
    languages: dict[str, Scores]

    def describe(self) -> dict[str, Any]:
        """As `comparison.json` holds it: the overall scores beside the name."""
        parts = {
            key: {name: dataclasses.asdict(scores) for name, scores in group.items()}
            for key, group in (("domains", self.domains), ("languages", self.languages))
        }
        named = {"name": self.name, "vocab_size": self.vocab_size}
        return {**named, **dataclasses.asdict(self.scores), **parts}


@dataclass(frozen=True, slots=True, eq=False)
class _Tally:
    """Counts of one document; they add up."""

    counts: np.ndarray
    """int64 [8]: tokens, unknown, bytes, characters, blank-separated words, words, words of one
    token, 1 when restored"""
    used: np.ndarray
    """Different ids."""


def take_subject(name: str, tokenizer: PreTrainedTokenizerFast) -> Subject:
    """`tokenizer` under a name; what it is set to (truncation, padding) does not matter."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    unknown = tokenizer.unk_token_id
    # GPT-2 and its kin name the end of text as their unknown token, which says nothing.
    if unknown is not None and unknown == tokenizer.eos_token_id:
        unknown = None
    bytewise = '"ByteLevel"' in json.dumps(json.loads(copy.to_str())["decoder"])
    return Subject(name, len(tokenizer), unknown, copy, bytewise)


def train_baselines(training: Iterable[str], size: int) -> list[Subject]:
    """The `size - 1` most frequent characters, and words: one token for all that they lack."""
    texts = list(training)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    entries = [UNKNOWN, *rank(counts)[: size - 1]]
    characters = build_character_speller(entries, UNKNOWN)
    words = build_word_speller({}, UNKNOWN)
    trainer = trainers.WordLevelTrainer(
        vocab_size=size, special_tokens=[UNKNOWN], show_progress=False
    )
    words.train_from_iterator(texts, trainer)
    named = (("characters", characters), ("words", words))
    for _, tokenizer in named:
        tokenizer.encode_special_tokens = True
    return [Subject(name, t.get_vocab_size(), 0, t, False) for name, t in named]


def compare(subjects: Iterable[Subject], sample: Sequence[Excerpt]) -> list[Comparison]:
    """Each of `subjects` on `sample`; raises `ValueError` when that is empty."""
    if not any(excerpt.text for excerpt in sample):
        raise ValueError("a comparison needs a sample of text")
    texts = [excerpt.text[:MEASURED_CHARACTERS] for excerpt in sample]
    domains = [excerpt.domain for excerpt in sample]
    languages = [excerpt.language for excerpt in sample]
    found = []
    for subject in subjects:
        tallies = list(_tally(subject, texts))
        found.append(
            Comparison(
                name=subject.name,
                vocab_size=subject.size,
                scores=_sum_up(tallies, subject.size),
                domains=_group(tallies, domains, subject.size),
                languages=_group(tallies, languages, subject.size),
            )
        )
    return found


def time_encoding(subject: Subject, sample: Sequence[Excerpt]) -> float:
    """Megabytes of UTF-8 that it encodes in a second, here and now, with all threads it may use."""
    texts = [excerpt.text[:MEASURED_CHARACTERS] for excerpt in sample]
    started = time.perf_counter()
    subject.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return sum(len(text.encode()) for text in texts) / 1e6 / (time.perf_counter() - started)


def cost_embedding(vocab_size: int, hidden_size: int, layers: int) -> tuple[int, float]:
    """Parameters of an embedding that input and output share, and their share of the model.

    The layers have 12 hidden_size^2 parameters each (Kaplan et al. 2020, section 2.1).
    """
    embedding = vocab_size * hidden_size
    return embedding, embedding / (embedding + 12 * layers * hidden_size**2)


def _tally(subject: Subject, texts: Sequence[str]) -> Iterable[_Tally]:
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        encoded = subject.tokenizer.encode_batch(batch, add_special_tokens=False)
        for text, encoding in zip(batch, encoded, strict=True):
            ids = np.array(encoding.ids, np.int64)
            unknown = 0 if subject.unknown is None else int((ids == subject.unknown).sum())
            restored = subject.tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
            words, single = _count_words(text, encoding, subject.unknown)
            counts = [
                *(len(ids), unknown, len(text.encode()), len(text)),
                *(len(text.split()), words, single, int(restored)),
            ]
            yield _Tally(np.array(counts, np.int64), np.unique(ids))


def _count_words(text: str, encoding: Encoding, unknown: int | None) -> tuple[int, int]:
    """Words, and those that one known token covers, alone or with the blank before."""
    spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    words = np.array([match.span() for match in _WORD.finditer(text)], np.int64).reshape(-1, 2)
    if not len(spans) or not len(words):
        return len(words), 0
    starts, ends = spans.T
    # Of the tokens that touch a word, the first and the one after the last.
    first = np.searchsorted(ends, words[:, 0], "right")
    after = np.searchsorted(starts, words[:, 1], "left")
    inside = np.minimum(first, len(spans) - 1)
    lead = words[:, 0] - starts[inside]
    blank = np.array([bool(s) and text[s - 1].isspace() for s in words[:, 0].tolist()])
    whole = (ends[inside] == words[:, 1]) & ((lead == 0) | ((lead == 1) & blank))
    known = np.ones(len(spans), bool) if unknown is None else np.array(encoding.ids) != unknown
    return len(words), int((whole & known[inside] & (after - first == 1)).sum())


def _group(tallies: Sequence[_Tally], labels: Sequence[str | None], size: int) -> dict[str, Scores]:
    """Scores by label, in alphabetical order; documents without one count overall only."""
    return {
        label: _sum_up([t for t, own in zip(tallies, labels, strict=True) if own == label], size)
        for label in sorted({label for label in labels if label is not None})
    }


def _sum_up(tallies: Sequence[_Tally], size: int) -> Scores:
    counts = np.sum([tally.counts for tally in tallies], axis=0).tolist()
    tokens, unknown, size_bytes, characters, blanks, words, single, restored = counts
    used = len(np.unique(np.concatenate([tally.used for tally in tallies])))
    return Scores(
        documents=len(tallies),
        tokens=tokens,
        bytes_per_token=round(size_bytes / max(1, tokens), 4),
        characters_per_token=round(characters / max(1, tokens), 4),
        fertility=round(tokens / max(1, blanks), 4),
        unknown_rate=round(unknown / max(1, tokens), 6),
        round_trip=round(restored / len(tallies), 4),
        single_token_share=round(single / max(1, words), 4),
        vocabulary_use=round(used / size, 4),
    )


Trainer = Callable[[int], PreTrainedTokenizerFast]


def trace_curve(
    train: Trainer, sizes: Iterable[int], sample: Sequence[Excerpt]
) -> list[tuple[int, float]]:
    """(vocabulary size, bytes per token) of a tokenizer trained at each of `sizes`."""
    curve = []
    for size in sorted(sizes):
        [found] = compare([take_subject("", train(size))], sample)
        curve.append((size, found.scores.bytes_per_token))
    return curve
