"""Finding evaluation items in documents by n-gram overlap.

An item shorter than the n-gram is matched whole, word for word; a longer one matches wherever a
document shares any n-gram with it (13 words: Brown et al. 2020, appendix C). Words are those of
`raylign.data.words`, so `7 + 3` is not found inside `17 + 35`, `7 + 39` or `7 + 3.5`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numba as nb
import numpy as np
import pyarrow as pa

from raylign.data.textbook.arithmetic import Problem, list_phrasings
from raylign.data.words import kernel, mix, split_words

_PRIME = np.uint64(0x9E3779B97F4A7C15)
_FEWEST_WORDS = 2

# What other authors write; the textbook's own phrasings come from `list_phrasings`.
_SHORT_FORMS = {
    "+": ("{a} + {b}", "{a} plus {b}", "sum of {a} and {b}", "add {a} and {b}"),
    "-": ("{a} - {b}", "{a} minus {b}", "difference of {a} and {b}", "subtract {b} from {a}"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """Hashes of everything that may not occur; small enough to travel to every worker."""

    lengths: np.ndarray
    """int64: the distinct n-gram lengths, ascending."""
    table: np.ndarray
    """uint64: open-addressing hash table, a power of two in size; 0 is a free place."""
    entries: int
    """Different n-grams in the table."""
    ignored: int
    """Items of fewer than two words, which would match everywhere."""


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """Occurrences of indexed n-grams in N documents, in order of document and position."""

    documents: np.ndarray
    """int64 [M]: which document."""
    starts: np.ndarray
    """int64 [M]: first byte of the occurrence inside the document (UTF-8)."""
    ends: np.ndarray
    """int64 [M]: the byte after its last."""


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A document without the lines that held evaluation items."""

    text: str
    removed: tuple[str, ...]


def build_index(items: Iterable[str], ngram: int) -> Index:
    """Index of evaluation `items` (texts)."""
    words = split_words(list(items))
    hashes: set[int] = set()
    lengths: set[int] = set()
    ignored = 0
    for item in range(len(words.offsets) - 1):
        own = words.of(item)
        if len(own) < _FEWEST_WORDS:
            ignored += 1
            continue
        length = min(len(own), ngram)
        lengths.add(length)
        hashes.update(_hash_ngrams(own, length).tolist())
    capacity = 1 << max(4, (2 * len(hashes)).bit_length())
    table = np.zeros(capacity, np.uint64)
    _insert(np.array(sorted(hashes), np.uint64), table)
    return Index(np.array(sorted(lengths), np.int64), table, len(hashes), ignored)


def list_needles(problems: Iterable[Problem]) -> list[str]:
    """Every way in which a text could ask or state one of `problems`.

    Besides the textbook's own phrasings: shorter ones, additions with their operands exchanged, and
    phrases with the operation written without blanks. (A bare `3+5=8` is not a needle: it is a step
    in the working of longer problems.)
    """
    needles: set[str] = set()
    for problem in problems:
        phrases = list_phrasings(problem)
        phrases += [form.format(a=problem.a, b=problem.b) for form in _SHORT_FORMS[problem.op]]
        needles.update(phrases)
        if problem.op == "+":
            needles.update(_exchange(phrases, problem))
    tight = {n.replace(" + ", "+").replace(" - ", "-") for n in needles if any(map(str.isalpha, n))}
    return sorted(needles | tight)


def _exchange(phrases: Iterable[str], problem: Problem) -> list[str]:
    """The phrases with `a` for `b` and `b` for `a`, which are the only numbers in them."""
    total = problem.a + problem.b
    return [re.sub(r"\d+", lambda number: str(total - int(number[0])), p) for p in phrases]


def find_matches(texts: pa.Array | pa.ChunkedArray | list[str], index: Index) -> Matches:
    """Every occurrence of an indexed n-gram."""
    words = split_words(texts)
    room = max(16, len(words.hashes) // 8)
    while True:
        found = np.empty((room, 3), np.int64)
        count = _search(
            words.hashes, words.offsets, words.starts, words.ends, index.lengths, index.table, found
        )
        if count <= room:
            found = found[:count]
            return Matches(found[:, 0], found[:, 1], found[:, 2])
        room = count


def overlapping(texts: Sequence[str], index: Index) -> list[int]:
    """Positions of the texts that contain an indexed item."""
    return np.unique(find_matches(list(texts), index).documents).tolist()


def remove_lines(texts: Sequence[str], index: Index) -> dict[int, Cleaned]:
    """The affected documents, by position, without every line that an occurrence touches.

    Repeats until nothing is found: lines that become neighbours may spell an item together.
    """
    cleaned: dict[int, Cleaned] = {}
    pending = dict(enumerate(texts))
    while pending:
        positions = list(pending)
        matches = find_matches(list(pending.values()), index)
        affected: dict[int, str] = {}
        bounds = np.searchsorted(matches.documents, np.arange(len(positions) + 1))
        for at in np.unique(matches.documents).tolist():
            spans = slice(bounds[at], bounds[at + 1])
            position = positions[at]
            result = _cut_lines(pending[position], matches.starts[spans], matches.ends[spans])
            before = cleaned[position].removed if position in cleaned else ()
            cleaned[position] = replace(result, removed=before + result.removed)
            affected[position] = result.text
        pending = affected
    return cleaned


def _cut_lines(text: str, starts: np.ndarray, ends: np.ndarray) -> Cleaned:
    """`text` without the lines that any byte span [start, end) touches."""
    lines = text.encode().split(b"\n")
    firsts = np.concatenate([[0], np.cumsum([len(line) + 1 for line in lines])])
    doomed = np.zeros(len(lines), bool)
    for start, end in zip(starts, ends, strict=True):
        first, last = np.searchsorted(firsts, [start, end - 1], side="right") - 1
        doomed[first : last + 1] = True
    kept = [line.decode() for line, gone in zip(lines, doomed, strict=True) if not gone]
    removed = tuple(line.decode() for line, gone in zip(lines, doomed, strict=True) if gone)
    return Cleaned("\n".join(kept).strip("\n"), removed)


@nb.njit(inline="always")
def _finish(value, length):
    """Hash of an n-gram from its polynomial; never 0, which marks a free place of the table."""
    return mix(value + np.uint64(length)) | np.uint64(1)


@kernel
def _hash_ngrams(words, length):
    """Hash of every `length`-gram of one text; uint64 [len(words) - length + 1]."""
    hashes = np.empty(max(0, len(words) - length + 1), np.uint64)
    for i in range(len(hashes)):
        value = np.uint64(0)
        for j in range(length):
            value = value * _PRIME + words[i + j]
        hashes[i] = _finish(value, length)
    return hashes


@kernel
def _insert(hashes, table):
    mask = np.uint64(len(table) - 1)
    for value in hashes:
        place = (value >> np.uint64(20)) & mask
        while table[place] != 0 and table[place] != value:
            place = (place + np.uint64(1)) & mask
        table[place] = value


@kernel
def _search(words, offsets, starts, ends, lengths, table, found):
    """Write (document, first byte, last byte) triples; returns how many there are in all."""
    mask = np.uint64(len(table) - 1)
    count = 0
    for document in range(len(offsets) - 1):
        stop = offsets[document + 1]
        for i in range(offsets[document], stop):
            value, taken = np.uint64(0), 0
            for length in lengths:
                if i + length > stop:
                    break
                while taken < length:
                    value = value * _PRIME + words[i + taken]
                    taken += 1
                needle = _finish(value, length)
                place = (needle >> np.uint64(20)) & mask
                while table[place] != 0 and table[place] != needle:
                    place = (place + np.uint64(1)) & mask
                if table[place] == needle:
                    if count < len(found):
                        found[count, 0] = document
                        found[count, 1] = starts[i]
                        found[count, 2] = ends[i + length - 1]
                    count += 1
    return count
