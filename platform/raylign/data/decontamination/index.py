"""Finding evaluation items in documents by n-gram overlap.

An item shorter than the n-gram is matched whole, word for word; a longer one by the n-grams that a
document shares with it (13 words: Brown et al. 2020, appendix C). One of them is enough, or they
must cover a share of the item's words (`Item.min_coverage`). Words are those of
`raylign.data.words`, so `7 + 3` is not found inside `17 + 35`, `7 + 39` or `7 + 3.5`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from raylign.data.decontamination import ngrams
from raylign.data.decontamination.lines import Cleaned, cut_lines
from raylign.data.textbook.arithmetic import Problem, list_phrasings
from raylign.data.words import Words, split_words

HELD_OUT = "held_out"
"""The task of the run's own held-out problems and texts."""

_FEWEST_WORDS = 2
_ROWS_AT_ONCE = 1 << 20  # (n-gram, item) pairs: a page of a benchmark has many
_TOLERANCE = 1e-12  # of shares, which are quotients of whole numbers

# What other authors write; the textbook's own phrasings come from `list_phrasings`.
_SHORT_FORMS = {
    "+": ("{a} + {b}", "{a} plus {b}", "sum of {a} and {b}", "add {a} and {b}"),
    "-": ("{a} - {b}", "{a} minus {b}", "difference of {a} and {b}", "subtract {b} from {a}"),
}


@dataclass(frozen=True, slots=True)
class Item:
    """A text that documents may not contain; an item of a task may have several."""

    task: str
    item: str
    """Which of the task: file and row."""
    text: str
    min_words: int = _FEWEST_WORDS
    """A text of fewer words is not looked for: it would match everywhere."""
    min_coverage: float = 0.0
    """A document holds the item when shared n-grams cover this share of the text's words; one
    n-gram is always needed."""


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """Everything that may not occur; small enough to travel to every worker."""

    lengths: np.ndarray
    """int64 [L]: the distinct n-gram lengths, ascending."""
    powers: np.ndarray
    """uint64 [L]"""
    blocks: np.ndarray
    """uint64: the Bloom filters of all lengths."""
    firsts: np.ndarray
    """int64 [L]: where the filter of each length begins."""
    shifts: np.ndarray
    """uint64 [L]: from a polynomial to its block."""
    keys: np.ndarray
    """uint64: open-addressing hash table of n-grams, a power of two in size; 0 is a free place."""
    numbers: np.ndarray
    """int32: the number of the n-gram in each place."""
    bounds: np.ndarray
    """int64 [E + 1]: n-gram e is in the texts owners[bounds[e]:bounds[e + 1]]."""
    owners: np.ndarray
    """int32: texts."""
    places: np.ndarray
    """int32: at which word of the text the n-gram begins."""
    sizes: np.ndarray
    """int64 [T]: words of each text."""
    min_coverage: np.ndarray
    """float64 [T]"""
    items: np.ndarray
    """int32 [T]: the item that each text belongs to."""
    tasks: np.ndarray
    """int32 [T]: the task of each text."""
    names: tuple[tuple[str, str], ...]
    """Task and name of each item."""
    entries: int
    """Different n-grams in use."""
    ignored: int
    """Texts of too few words."""
    unused: tuple[tuple[str, str], ...]
    """Task and name of the items that have no other text."""


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """Occurrences of indexed n-grams in N documents, in order of document and position."""

    documents: np.ndarray
    """int64 [M]: which document."""
    starts: np.ndarray
    """int64 [M]: first byte of the occurrence inside the document (UTF-8)."""
    ends: np.ndarray
    """int64 [M]: the byte after its last."""
    words: np.ndarray
    """int64 [M]: which word of the document is its first."""
    lengths: np.ndarray
    """int64 [M]: words."""
    entries: np.ndarray
    """int64 [M]: number of the n-gram."""
    sizes: np.ndarray
    """int64 [N]: words of each document."""


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """Which occurrences count, and which texts the documents hold by them."""

    counted: np.ndarray
    """bool [M]: the matches of a text that its document covers enough of."""
    matches: np.ndarray
    """int64 [R]: a match, the first of its n-gram in its document."""
    texts: np.ndarray
    """int64 [R]: a text that it is credited to; rows are in order of document and text."""
    coverage: np.ndarray
    """float64 [R]: share of the text's words that the document's matches cover."""


def build_index(items: Iterable[Item | str], ngram: int) -> Index:
    """Index of items; a bare text is one of `HELD_OUT`, named by its position."""
    given = [
        item if isinstance(item, Item) else Item(HELD_OUT, str(position), item)
        for position, item in enumerate(items)
    ]
    numbers: dict[tuple[str, str], int] = {}
    for item in given:
        numbers.setdefault((item.task, item.item), len(numbers))
    owners_of = np.array([numbers[item.task, item.item] for item in given], np.int32)
    words = split_words([item.text for item in given])
    sizes = np.diff(words.offsets)
    floors = np.array([max(item.min_words, _FEWEST_WORDS) for item in given], np.int64)
    used = sizes >= floors
    widths = np.where(used, np.minimum(sizes, ngram), 0)
    polynomials, hashes, texts, places = _list_ngrams(words, widths)
    distinct, first, entry = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(entry, kind="stable")
    lengths = np.unique(widths[used])
    kinds = widths[texts[first]]
    blocks, firsts, shifts = ngrams.build_filters(
        [polynomials[first[kinds == length]] for length in lengths]
    )
    keys, places_of = ngrams.build_table(distinct)
    alive = np.bincount(owners_of[used], minlength=len(numbers)) > 0
    names = tuple(numbers)
    tasks = {task: number for number, task in enumerate(sorted({task for task, _ in names}))}
    return Index(
        lengths=lengths,
        powers=ngrams.list_powers(lengths),
        blocks=blocks,
        firsts=firsts,
        shifts=shifts,
        keys=keys,
        numbers=places_of,
        bounds=np.searchsorted(entry[order], np.arange(len(distinct) + 1)),
        owners=texts[order],
        places=places[order],
        sizes=sizes,
        min_coverage=np.array([item.min_coverage for item in given], np.float64),
        items=owners_of,
        tasks=np.array([tasks[item.task] for item in given], np.int32),
        names=names,
        entries=len(distinct),
        ignored=int(len(given) - used.sum()),
        unused=tuple(name for name, lives in zip(names, alive, strict=True) if not lives),
    )


def _list_ngrams(
    words: Words, widths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Polynomial, hash, text and first word of every n-gram of the texts with a width."""
    sizes = np.diff(words.offsets)
    room = int(np.where(widths > 0, sizes - widths + 1, 0).sum())
    polynomials, hashes = np.empty(room, np.uint64), np.empty(room, np.uint64)
    texts, places = np.empty(room, np.int32), np.empty(room, np.int32)
    ngrams.hash_items(words.hashes, words.offsets, widths, polynomials, hashes, texts, places)
    return polynomials, hashes, texts, places


def drop_common(index: Index, documents: np.ndarray, most: int) -> Index:
    """`index` without the n-grams of evaluation sets that more than `most` documents contain.

    `documents` is the sum of `count_documents` over the corpus. Brown et al. (2020, appendix C)
    ignored 13-grams of more than 10 documents, most of them common phrases and legal boilerplate.
    What is `HELD_OUT` stays: short problems recur, and none of them may.
    """
    entry = np.repeat(np.arange(len(index.bounds) - 1), np.diff(index.bounds))
    own = np.array([task == HELD_OUT for task, _ in index.names], bool)
    stays = (documents[entry] <= most) | own[index.items[index.owners]]
    left = np.bincount(entry[stays], minlength=len(index.bounds) - 1)
    return replace(
        index,
        bounds=np.concatenate([[0], np.cumsum(left)]),
        owners=index.owners[stays],
        places=index.places[stays],
        entries=int((left > 0).sum()),
    )


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


def find_matches(texts: pa.Array | pa.ChunkedArray | Sequence[str], index: Index) -> Matches:
    """Every occurrence of an indexed n-gram; a null counts as an empty text."""
    if not isinstance(texts, pa.Array | pa.ChunkedArray | list):
        texts = list(texts)
    words = split_words(texts)
    sizes = np.diff(words.offsets)
    room = max(16, len(words.hashes) // 64)
    while True:
        found = np.empty((room, 4), np.int64)
        count = ngrams.search(
            words.hashes,
            words.offsets,
            index.lengths,
            index.powers,
            index.blocks,
            index.firsts,
            index.shifts,
            index.keys,
            index.numbers,
            found,
        )
        if count <= room:
            break
        room = count
    document, first, length, entry = found[:count].T
    order = np.lexsort((length, first, document))
    document, first, length, entry = (c[order] for c in (document, first, length, entry))
    return Matches(
        documents=document,
        starts=words.starts[first],
        ends=words.ends[first + length - 1],
        words=first - words.offsets[document],
        lengths=length,
        entries=entry,
        sizes=sizes,
    )


def count_documents(texts: pa.Array | pa.ChunkedArray | Sequence[str], index: Index) -> np.ndarray:
    """How many of `texts` contain each n-gram; int64 [E], to be summed over the corpus."""
    matches = find_matches(texts, index)
    pairs = np.unique(np.stack([matches.documents, matches.entries]), axis=1)
    return np.bincount(pairs[1], minlength=len(index.bounds) - 1)


def weigh(matches: Matches, index: Index) -> Evidence:
    """The occurrences of those texts that a document covers enough of.

    The coverage of a text is the share of its words that lie in any of its n-grams that the
    document contains (Touvron et al. 2023, A.6; Lambert et al. 2024, section 3.2). Items of a task
    may share n-grams (the wording of a template): such a one is credited to the items that the
    document covers most of, so that one question does not stand for hundreds like it.
    """
    sharers = index.bounds[matches.entries + 1] - index.bounds[matches.entries]
    edges = np.searchsorted(matches.documents, np.arange(len(matches.sizes) + 1))
    rows = np.concatenate([[0], np.cumsum(sharers)])[edges]
    parts = [_weigh_part(matches, slice(0, 0), index)]
    first = 0
    while first < len(matches.sizes):
        stop = int(np.searchsorted(rows, rows[first] + _ROWS_AT_ONCE, side="right")) - 1
        stop = max(first + 1, stop)
        if edges[stop] > edges[first]:
            parts.append(_weigh_part(matches, slice(edges[first], edges[stop]), index))
        first = stop
    return Evidence(
        np.concatenate([part.counted for part in parts]),
        np.concatenate([part.matches for part in parts]),
        np.concatenate([part.texts for part in parts]),
        np.concatenate([part.coverage for part in parts]),
    )


def _weigh_part(matches: Matches, part: slice, index: Index) -> Evidence:
    """Evidence from a slice of the matches: all of those in some of the documents."""
    documents, entries = matches.documents[part], matches.entries[part]
    pairs, match, pair_of = np.unique(
        documents * len(index.bounds) + entries, return_index=True, return_inverse=True
    )
    pair, row = _expand(entries[match], index.bounds)
    text, place = index.owners[row].astype(np.int64), index.places[row].astype(np.int64)
    # One number for document and text, from 0 on for the first document of the part.
    text += (documents[match] - documents[:1].sum())[pair] * len(index.sizes)
    order = np.argsort(text * int(index.sizes.max(initial=1)) + place)
    pair, text, place = pair[order], text[order], place[order]
    length = matches.lengths[part][match[pair]]
    fresh = np.ones(len(pair), bool)
    fresh[1:] = np.diff(text) != 0
    text %= len(index.sizes)
    # A text's n-grams are all of one length: each adds what lies before the next one begins.
    added = length.copy()
    inner = np.flatnonzero(~fresh)
    added[inner - 1] = np.minimum(length[inner - 1], place[inner] - place[inner - 1])
    group = np.cumsum(fresh) - 1
    coverage = np.bincount(group, added)[group] / index.sizes[text] if len(group) else np.empty(0)
    enough = coverage >= index.min_coverage[text] - _TOLERANCE
    counts = np.zeros(len(pairs), bool)
    counts[pair[enough]] = True
    pair, text, group, coverage = pair[enough], text[enough], group[enough], coverage[enough]
    tasks = int(index.tasks.max(initial=0)) + 1
    rival = pair * tasks + index.tasks[text]
    best = np.zeros(len(pairs) * tasks)
    np.maximum.at(best, rival, coverage)
    credited = np.zeros(int(group.max(initial=-1)) + 1, bool)
    credited[group[coverage >= best[rival] - _TOLERANCE]] = True
    stays = credited[group]
    first = part.start + match[pair[stays]]
    return Evidence(counts[pair_of], first, text[stays], coverage[stays])


def _expand(entries: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(which of `entries`, row) for every row bounds[e]..bounds[e + 1] of every entry e."""
    counts = bounds[entries + 1] - bounds[entries]
    which = np.repeat(np.arange(len(entries)), counts)
    before = np.cumsum(counts) - counts
    return which, np.arange(len(which)) + (bounds[entries] - before)[which]


def overlapping(texts: pa.Array | pa.ChunkedArray | Sequence[str], index: Index) -> list[int]:
    """Positions of the texts that contain an indexed item."""
    if not len(index.lengths):
        return []
    matches = find_matches(texts, index)
    return np.unique(matches.documents[weigh(matches, index).counted]).tolist()


def remove_lines(texts: Sequence[str], index: Index, window: int = 0) -> dict[int, Cleaned]:
    """The affected documents, by position, without every line that an occurrence touches.

    Lines within `window` bytes of an occurrence go too. Repeats until nothing is found: lines that
    become neighbours may spell an item together.
    """
    cleaned: dict[int, Cleaned] = {}
    pending = dict(enumerate(texts))
    while pending:
        positions = list(pending)
        matches = find_matches(list(pending.values()), index)
        counted = weigh(matches, index).counted
        documents = matches.documents[counted]
        starts, ends = matches.starts[counted] - window, matches.ends[counted] + window
        affected: dict[int, str] = {}
        bounds = np.searchsorted(documents, np.arange(len(positions) + 1))
        for at in np.unique(documents).tolist():
            spans = slice(bounds[at], bounds[at + 1])
            position = positions[at]
            result = cut_lines(pending[position], starts[spans], ends[spans])
            before = cleaned[position].removed if position in cleaned else ()
            cleaned[position] = replace(result, removed=before + result.removed)
            affected[position] = result.text
        pending = affected
    return cleaned
