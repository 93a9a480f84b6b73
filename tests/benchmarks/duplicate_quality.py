"""What a removal of near-duplicates did, against exact Jaccard similarity of word 5-grams.

Words are runs of ASCII letters and digits, lower-cased, found by Arrow's functions: a definition of
its own, not that of the tools under test. Pairs are found exhaustively, by an inverted index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raylign.data.words import kernel, mix

NGRAM = 5
LEAST = 0.5
"""Pairs below this similarity are not listed."""
BANDS = ((0.9, 1.01), (0.8, 0.9), (0.7, 0.8), (0.6, 0.7), (0.5, 0.6))


@dataclass(frozen=True, slots=True, eq=False)
class Shingles:
    """The distinct n-grams of N documents as 64-bit hashes."""

    hashes: np.ndarray
    """uint64 [S]: ascending within a document."""
    offsets: np.ndarray
    """int64 [N + 1]"""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a tool did with N documents."""

    kept: np.ndarray
    """bool [N]"""
    keeper: np.ndarray
    """int64 [N]: the kept document that a removed one went for; -1 when kept or not told."""


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Documents with an exact similarity of at least `LEAST`, or those that were planted."""

    documents: np.ndarray
    """int64 [P, 2]"""
    similarity: np.ndarray
    """float64 [P]"""


def read_shingles(files: Sequence[Path]) -> Shingles:
    """Shingles of all documents of the files, in order."""
    numbers: dict[str, int] = {}
    hashes, sizes = [], []
    for file in files:
        text = pc.utf8_lower(pq.read_table(file, columns=["text"])["text"].combine_chunks())
        plain = pc.utf8_trim(pc.replace_substring_regex(text, "[^a-z0-9]+", " "), " ")
        lists = pc.split_pattern(plain, " ")
        coded = pc.dictionary_encode(pc.list_flatten(lists))
        known = [numbers.setdefault(word, len(numbers)) for word in coded.dictionary.to_pylist()]
        words = np.array(known, np.int64)[coded.indices.to_numpy()]
        lengths = pc.list_value_length(lists).to_numpy()
        found, counts = _shingle(words, np.concatenate([[0], np.cumsum(lengths)]), NGRAM)
        hashes.append(found)
        sizes.append(counts)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return Shingles(np.concatenate(hashes), offsets)


def find_pairs(shingles: Shingles) -> Pairs:
    """All pairs of documents with a similarity of at least `LEAST`."""
    order = np.argsort(shingles.hashes, kind="stable")
    owner = np.repeat(np.arange(len(shingles.offsets) - 1), np.diff(shingles.offsets))[order]
    values = shingles.hashes[order]
    new = np.concatenate([[True], values[1:] != values[:-1]])
    group = np.empty(len(order), np.int64)
    group[order] = np.cumsum(new) - 1
    starts = np.append(np.flatnonzero(new), len(order))
    documents, similarity = _find(shingles.offsets, group, starts, owner, LEAST)
    return Pairs(documents, similarity)


def compare(shingles: Shingles, documents: np.ndarray) -> np.ndarray:
    """Exact similarity of the pairs; float64 [P] for int64 [P, 2]."""
    return _compare(shingles.hashes, shingles.offsets, np.ascontiguousarray(documents, np.int64))


def read_outcome(output: Path, tool: str, documents: int, part: int) -> Outcome:
    """What the tool's output files say of a corpus with parts of `part` documents."""
    keeper = np.full(documents, -1)
    if tool == "data-juicer":
        kept = np.zeros(documents, bool)
        for file in (output / "documents").glob("*.parquet"):
            kept[_rows(pq.read_table(file, columns=["doc_id"])["doc_id"])] = True
        return Outcome(kept, keeper)
    kept = np.ones(documents, bool)
    if tool == "raylign":
        for file in (output / "corpus" / "excluded").glob("*.parquet"):
            table = pq.read_table(file, columns=["doc_id", "duplicate_of"])
            gone = _rows(table["doc_id"])
            kept[gone], keeper[gone] = False, _rows(table["duplicate_of"])
        return Outcome(kept, keeper)
    clusters: list[np.ndarray] = []
    for file in (output / "clusters").glob("*.remove"):
        kept[int(file.stem) * part + np.fromfile(file, "<u4")] = False
    for file in (output / "clusters").glob("*.clusters"):
        pairs = np.fromfile(file, "<u4").reshape(-1, 2).astype(np.int64)
        clusters.append(pairs + np.array([int(file.stem) * part, 0]))
    members = np.concatenate(clusters)
    standing = np.full(members[:, 1].max() + 1, -1)
    stays = kept[members[:, 0]]
    standing[members[stays, 1]] = members[stays, 0]
    keeper[members[~stays, 0]] = standing[members[~stays, 1]]
    return Outcome(kept, keeper)


def share_found(pairs: Pairs, kept: np.ndarray) -> list[tuple[int, float]]:
    """By `BANDS` of similarity: how many pairs, and the share of which not both were kept."""
    both = kept[pairs.documents].all(axis=1)
    found = []
    for low, high in BANDS:
        here = (pairs.similarity >= low) & (pairs.similarity < high)
        found.append((int(here.sum()), float((~both[here]).mean()) if here.any() else float("nan")))
    return found


def nearest_kept(pairs: Pairs, kept: np.ndarray) -> np.ndarray:
    """Largest similarity of each document to another one that was kept; 0 below `LEAST`."""
    nearest = np.zeros(len(kept))
    for one, two in ((0, 1), (1, 0)):
        stays = kept[pairs.documents[:, two]]
        np.maximum.at(nearest, pairs.documents[stays, one], pairs.similarity[stays])
    return nearest


def _rows(ids: pa.ChunkedArray) -> np.ndarray:
    """Documents' numbers, from the second half of their ids."""
    return np.array([int(value[16:], 16) for value in ids.to_pylist()], np.int64)


@kernel
def _shingle(words, offsets, ngram):
    hashes = np.empty(len(words) + len(offsets), np.uint64)
    counts = np.empty(len(offsets) - 1, np.int64)
    used = 0
    for document in range(len(offsets) - 1):
        first, size = offsets[document], offsets[document + 1] - offsets[document]
        width = min(ngram, size)
        own = np.empty(size - width + 1, np.uint64)
        for i in range(len(own)):
            value = np.uint64(width)
            for j in range(width):
                value = mix(value * np.uint64(0x9E3779B97F4A7C15) + np.uint64(words[first + i + j]))
            own[i] = value
        own.sort()
        before = used
        for i in range(len(own)):
            if i == 0 or own[i] != own[i - 1]:
                hashes[used] = own[i]
                used += 1
        counts[document] = used - before
    return hashes[:used].copy(), counts


@kernel
def _find(offsets, group, starts, owner, least):
    size = len(offsets) - 1
    shared, touched = np.zeros(size, np.int64), np.empty(size, np.int64)
    documents, similarity = np.empty((1024, 2), np.int64), np.empty(1024, np.float64)
    used = 0
    for document in range(size):
        count = 0
        for i in range(offsets[document], offsets[document + 1]):
            for at in range(starts[group[i]], starts[group[i] + 1]):
                other = owner[at]
                if other >= document:
                    break
                if shared[other] == 0:
                    touched[count] = other
                    count += 1
                shared[other] += 1
        mine = offsets[document + 1] - offsets[document]
        for i in range(count):
            other = touched[i]
            union = mine + offsets[other + 1] - offsets[other] - shared[other]
            value = shared[other] / union
            shared[other] = 0
            if value < least:
                continue
            if used == len(similarity):
                documents = np.concatenate((documents, np.empty_like(documents)))
                similarity = np.concatenate((similarity, np.empty_like(similarity)))
            documents[used, 0], documents[used, 1] = other, document
            similarity[used] = value
            used += 1
    return documents[:used].copy(), similarity[:used].copy()


@kernel
def _compare(hashes, offsets, documents):
    similarity = np.empty(len(documents), np.float64)
    for p in range(len(documents)):
        one, two = documents[p, 0], documents[p, 1]
        i, j, shared = offsets[one], offsets[two], 0
        while i < offsets[one + 1] and j < offsets[two + 1]:
            if hashes[i] == hashes[j]:
                i, j, shared = i + 1, j + 1, shared + 1
            elif hashes[i] < hashes[j]:
                i += 1
            else:
                j += 1
        union = offsets[one + 1] - offsets[one] + offsets[two + 1] - offsets[two] - shared
        similarity[p] = shared / union if union else 0.0
    return similarity
