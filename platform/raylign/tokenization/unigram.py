"""Training a unigram tokenizer (Kudo 2018): the pieces under which the text is most likely.

It starts with every frequent substring of the words, estimates their probabilities by expectation
maximisation over all segmentations, and drops the pieces that are missed least until as many are
left as were asked for. Sums are taken in a fixed order, so the same text gives the same pieces,
which the trainer of the `tokenizers` library does not promise.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex  # type: ignore[import-untyped]
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raylign.data.words import kernel
from raylign.tokenization.special import (
    BYTES,
    SPECIAL,
    UNKNOWN,
    add_tags,
    require_room,
    require_size,
    split_at_markup,
    wrap,
)

LONGEST = 16
"""Characters of a piece at most."""
COVERAGE = 0.9995
"""With bytes to fall back on: the share of the text whose characters get entries."""
MOST_WORDS = 200_000
"""Different words that pieces are learnt from: the most frequent ones."""
SEEDS = 8
"""Pieces to begin with for each that is to stay."""
SHRINK = 0.75
ROUNDS = 2
RAREST = 1e-4

Edges = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Occurrences of pieces in words, by word and then by start: first occurrence of each word [W + 1],
and start, end and piece of each occurrence."""


@dataclass(frozen=True, slots=True, eq=False)
class _Material:
    """Words with their frequencies."""

    words: list[str]
    counts: np.ndarray
    """float64 [W]"""
    lengths: np.ndarray
    """int64 [W], in characters"""


def train_unigram(
    texts: Iterable[str],
    vocab_size: int,
    tags: Sequence[str] = (),
    chat_template: Path | None = None,
    byte_fallback: bool = True,
    single_digits: bool = True,
    key: str = "tokenizer.vocab_size",
) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocab_size` entries: special tokens, bytes, pieces, `tags`.

    Blanks are part of the pieces, so that decoding restores them. With `byte_fallback` the rarest
    characters (one in 2,000) are spelt in bytes; without it every character of the texts is an
    entry, and others are `<unk>`. Raises `UserError` when `vocab_size` does not fit the texts.
    """
    special = (*SPECIAL, UNKNOWN)
    fixed = [*special, *(BYTES if byte_fallback else ())]
    require_room(vocab_size, len(fixed) + len(tags), "pieces", key)
    room = vocab_size - len(fixed) - len(tags)
    clean = split_at_markup(texts, (*special, *tags))
    material, alphabet = _gather(clean, single_digits, COVERAGE if byte_fallback else 1.0)
    require_room(vocab_size, vocab_size - room + len(alphabet) - 1, "its characters", key)
    pieces, scores = learn_pieces(material, alphabet, room)
    require_size(len(pieces) + vocab_size - room, vocab_size, key)
    lowest = min(scores, default=0.0)
    vocabulary = [(entry, lowest) for entry in fixed] + list(zip(pieces, scores, strict=True))
    model = models.Unigram(vocabulary, unk_id=fixed.index(UNKNOWN), byte_fallback=byte_fallback)
    tokenizer = Tokenizer(model)
    # The model would take text that spells `<eos>` or `<0x41>` for those entries: cut it in two.
    names = "|".join(regex.escape(entry[1:]) for entry in special)
    guard = pre_tokenizers.Split(Regex(f"<(?={names}|0x[0-9A-F]{{2}}>)"), "isolated")
    words = pre_tokenizers.Split(Regex(_word_pattern(single_digits)), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([guard, words])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    add_tags(tokenizer, tags)
    return wrap(tokenizer, chat_template, UNKNOWN)


def _word_pattern(single_digits: bool) -> str:
    """Letters, numbers and signs with the blank before them, and other blanks."""
    numbers = r"\p{N}" if single_digits else r" ?\p{N}+"
    return rf" ?[\p{{L}}\p{{M}}]+|{numbers}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+|\s+(?!\S)|\s+"


def _gather(
    texts: Iterable[str], single_digits: bool, coverage: float
) -> tuple[_Material, list[str]]:
    """Words in a fixed order, cut where a character is not covered, and the covered characters."""
    pattern = regex.compile(_word_pattern(single_digits))
    found: Counter[str] = Counter()
    for text in texts:
        found.update(pattern.findall(text))
    characters: Counter[str] = Counter()
    for word, count in found.items():
        for character in word:
            characters[character] += count
    alphabet = _cover(characters, coverage)
    if len(alphabet) < len(characters):
        lacking = regex.compile("[" + "".join(map(regex.escape, characters - alphabet)) + "]")
        parts: Counter[str] = Counter()
        for word, count in found.items():
            for part in lacking.split(word):
                if part:
                    parts[part] += count
        found = parts
    ranked = sorted(found, key=lambda word: (-found[word], word))[:MOST_WORDS]
    counts = np.array([found[word] for word in ranked], np.float64)
    return _Material(ranked, counts, np.array([len(w) for w in ranked], np.int64)), sorted(alphabet)


def _cover(characters: Counter[str], coverage: float) -> Counter[str]:
    """The most frequent characters that make up so much of the text."""
    covered: Counter[str] = Counter()
    wanted, held = coverage * characters.total(), 0
    for character in sorted(characters, key=lambda c: (-characters[c], c)):
        if held >= wanted:
            break
        covered[character] = characters[character]
        held += characters[character]
    return covered


def learn_pieces(
    material: _Material, alphabet: Sequence[str], room: int
) -> tuple[list[str], list[float]]:
    """At most `room` pieces, the whole alphabet among them, and their log probabilities."""
    pieces = _seed(material, alphabet, room)
    if not pieces:
        return [], []
    scores = np.zeros(len(pieces))
    edges = _find_edges(material.words, pieces)
    for _ in range(64):
        for _ in range(ROUNDS):
            expected = _expect(*edges, material.lengths, material.counts, scores)
            scores = _maximise(expected)
        if len(pieces) <= room:
            break
        keep = _prune(pieces, expected, scores, max(room, int(SHRINK * len(pieces))))
        pieces, scores = [pieces[i] for i in keep], scores[keep]
        edges = _restrict(edges, keep)
    order = sorted(range(len(pieces)), key=lambda i: (-round(float(scores[i]), 6), pieces[i]))
    return [pieces[i] for i in order], [round(float(scores[i]), 6) for i in order]


def _seed(material: _Material, alphabet: Sequence[str], room: int) -> list[str]:
    """The alphabet, and the substrings that make up most of the text."""
    found: Counter[str] = Counter()
    for word, count in zip(material.words, material.counts.tolist(), strict=True):
        for start in range(len(word) - 1):
            for end in range(start + 2, min(len(word), start + LONGEST) + 1):
                found[word[start:end]] += int(count)
    frequent = [piece for piece, count in found.items() if count > 1]
    frequent.sort(key=lambda piece: (-found[piece] * len(piece), piece))
    return [*alphabet, *frequent[: max(0, SEEDS * room - len(alphabet))]]


def _find_edges(words: Sequence[str], pieces: Sequence[str]) -> Edges:
    places = {piece: place for place, piece in enumerate(pieces)}
    # Arrays of machine integers: a tuple for each of millions of occurrences would fill memory.
    first, starts, ends, found = (array(code) for code in "qiii")
    first.append(0)
    for word in words:
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + LONGEST) + 1):
                place = places.get(word[start:end])
                if place is not None:
                    starts.append(start)
                    ends.append(end)
                    found.append(place)
        first.append(len(found))
    return (
        np.array(first, np.int64),
        np.array(starts, np.int32),
        np.array(ends, np.int32),
        np.array(found, np.int32),
    )


def _restrict(edges: Edges, keep: Sequence[int]) -> Edges:
    """The occurrences of the pieces that stay, numbered anew."""
    first, starts, ends, pieces = edges
    renumbered = np.full(int(pieces.max(initial=0)) + 1, -1, np.int32)
    kept = np.asarray(keep, np.int64)
    kept_seen = kept < len(renumbered)
    renumbered[kept[kept_seen]] = np.flatnonzero(kept_seen)
    stays = renumbered[pieces] >= 0
    before = np.concatenate([[0], np.cumsum(stays)])
    return before[first], starts[stays], ends[stays], renumbered[pieces[stays]]


def _maximise(expected: np.ndarray) -> np.ndarray:
    counts = np.maximum(expected, RAREST)
    return np.log(counts) - np.log(counts.sum())


def _prune(
    pieces: Sequence[str], expected: np.ndarray, scores: np.ndarray, target: int
) -> list[int]:
    """Places of the `target` pieces that the text would miss most; single characters stay.

    A piece is missed by how much less likely its best spelling with others is, as often as it
    is expected.
    """
    first, starts, ends, places = _find_edges(pieces, pieces)
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    spelt = _spell_otherwise(first, starts, ends, places, lengths, scores)
    loss = expected * (scores - spelt)
    single = [i for i, piece in enumerate(pieces) if len(piece) == 1]
    others = [i for i, piece in enumerate(pieces) if len(piece) > 1]
    others.sort(key=lambda i: (-round(float(loss[i]), 6), pieces[i]))
    return sorted(single + others[: max(0, target - len(single))])


@kernel
def _add(a, b):
    """log(exp(a) + exp(b))"""
    if a < b:
        a, b = b, a
    return a if b == -np.inf else a + np.log1p(np.exp(b - a))


@kernel
def _expect(first, starts, ends, pieces, lengths, counts, scores):
    """How often each piece is expected over all segmentations of all words."""
    expected = np.zeros(len(scores))
    for word in range(len(lengths)):
        low, high, length = first[word], first[word + 1], lengths[word]
        forward = np.full(length + 1, -np.inf)
        backward = np.full(length + 1, -np.inf)
        forward[0] = backward[length] = 0.0
        for e in range(low, high):
            value = forward[starts[e]] + scores[pieces[e]]
            forward[ends[e]] = _add(forward[ends[e]], value)
        for e in range(high - 1, low - 1, -1):
            value = backward[ends[e]] + scores[pieces[e]]
            backward[starts[e]] = _add(backward[starts[e]], value)
        for e in range(low, high):
            value = forward[starts[e]] + scores[pieces[e]] + backward[ends[e]] - forward[length]
            expected[pieces[e]] += counts[word] * np.exp(value)
    return expected


@kernel
def _spell_otherwise(first, starts, ends, pieces, lengths, scores):
    """Log probability of the best spelling of each piece with other pieces; -inf for characters."""
    spelt = np.full(len(lengths), -np.inf)
    for word in range(len(lengths)):
        best = np.full(lengths[word] + 1, -np.inf)
        best[0] = 0.0
        for e in range(first[word], first[word + 1]):
            if pieces[e] != word:
                best[ends[e]] = max(best[ends[e]], best[starts[e]] + scores[pieces[e]])
        spelt[word] = best[lengths[word]]
    return spelt
