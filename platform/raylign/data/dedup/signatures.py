"""Exact and near-duplicate documents.

Exact: 128-bit hash of the text without regard to case and white space. Near: MinHash signatures of
word n-grams (Broder 1997), banded so that similar documents share a band (LSH; Leskovec, Rajaraman
and Ullman, chapter 3). Documents that share a band are only *candidates*: a pair counts when its
signatures agree often enough, and documents are then kept greedily, so that every removed document
has a kept one whose estimated Jaccard similarity reaches the threshold. Connected components, the
usual alternative, chain: A like B like C removes C for an A it does not resemble.

All of it is a function of the documents and their order, not of who computes what when.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from raylign.config import DedupConfig
from raylign.data.words import kernel, mix, split_words

# A band shared by more documents than this yields pairs with its first document only: the number
# of pairs stays linear where boilerplate makes thousands alike.
LARGE_BUCKET = 64

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Signatures:
    """MinHash signatures of N documents, reduced to what grouping and checking need."""

    bands: np.ndarray
    """uint64 [N, bands]: documents with an equal entry in a column are candidates."""
    sketches: np.ndarray
    """uint8 [N, bands * rows]: eight bits of each minimum, enough to estimate similarity."""
    shingles: np.ndarray
    """int64 [N]: n-grams of each document; without any it has no near-duplicates."""


@dataclass(frozen=True, slots=True, eq=False)
class Duplicates:
    """What to do with each of N documents."""

    keeper: np.ndarray
    """int64 [N]: the document that stands for it; itself when kept."""
    similarity: np.ndarray
    """float32 [N]: to its keeper: 1 for exact copies and kept ones, estimated Jaccard otherwise."""
    exact: np.ndarray
    """bool [N]: removed as an exact copy."""

    @property
    def kept(self) -> np.ndarray:
        """bool [N]"""
        return self.keeper == np.arange(len(self.keeper))


def hash_text(text: str) -> bytes:
    """16 bytes that are equal for texts that differ in case and white space only."""
    return xxhash.xxh3_128_digest(" ".join(text.casefold().split()).encode())


def sign(texts: pa.Array | pa.ChunkedArray | list[str], config: DedupConfig) -> Signatures:
    """MinHash signatures over n-grams of `config.ngram` words.

    A document with fewer words is one shingle.
    """
    words = split_words(texts)
    size, count = len(words.offsets) - 1, config.bands * config.rows
    bands = np.empty((size, config.bands), np.uint64)
    sketches = np.empty((size, count), np.uint8)
    shingles = np.empty(size, np.int64)
    slopes, shifts = _coefficients(count)
    _sign(words.hashes, words.offsets, slopes, shifts, config.ngram, bands, sketches, shingles)
    return Signatures(bands, sketches, shingles)


def find_duplicates(hashes: np.ndarray, signatures: Signatures, config: DedupConfig) -> Duplicates:
    """Decide for documents given in order of preference.

    `hashes` (S16 [N]) are those of `hash_text`. Of exact copies the first stays; of near-duplicates
    the one with the most near-duplicates, then the first.
    """
    size = len(hashes)
    first = _first_of_equal(hashes)
    unique = np.flatnonzero(first == np.arange(size))
    candidates = unique[signatures.shingles[unique] > 0]
    pairs = candidates[find_candidates(signatures.bands[candidates])]
    agreed = _agreement(signatures.sketches, pairs)
    pairs = pairs[agreed >= needed_agreement(config)]
    keeper = _keep_greedily(pairs, size)
    keeper = keeper[first]
    same = first == keeper
    together = np.stack([first, keeper], axis=1)[~same]
    similarity = np.ones(size, np.float32)
    count = config.bands * config.rows
    similarity[~same] = estimate_jaccard(_agreement(signatures.sketches, together), count)
    exact = (first != np.arange(size)) & same
    return Duplicates(keeper, similarity, exact)


def find_candidates(bands: np.ndarray) -> np.ndarray:
    """Pairs (earlier, later), int64 [P, 2], of rows that share an entry in some column; each once.

    `bands` is uint64 [N, bands]. Entries shared by more than `LARGE_BUCKET` rows pair all of them
    with the first only.
    """
    size = len(bands)
    found = [np.empty(0, np.uint64)]
    for column in range(bands.shape[1]):
        keys = np.ascontiguousarray(bands[:, column])
        order = np.argsort(keys, kind="stable")
        pairs = _pairs_of_runs(keys[order], order, LARGE_BUCKET)
        codes = pairs[:, 0].astype(np.uint64) * np.uint64(size) + pairs[:, 1].astype(np.uint64)
        found.append(codes)
    codes = np.unique(np.concatenate(found))
    if not len(codes):
        return np.empty((0, 2), np.int64)
    return np.stack(np.divmod(codes, np.uint64(size)), axis=1).astype(np.int64)


def needed_agreement(config: DedupConfig) -> int:
    """How many sketch bytes of a pair must agree for an estimate of at least the threshold."""
    share = config.threshold + (1 - config.threshold) / 256
    return math.ceil(config.bands * config.rows * share - 1e-9)


def estimate_jaccard(agreed: np.ndarray, count: int) -> np.ndarray:
    """Jaccard similarity from `agreed` of `count` equal sketch bytes; 1 in 256 agrees by chance."""
    return np.clip((agreed / count - 1 / 256) / (1 - 1 / 256), 0.0, 1.0).astype(np.float32)


def _first_of_equal(hashes: np.ndarray) -> np.ndarray:
    """Index of the first document with each document's hash; int64 [N]."""
    _, firsts, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return firsts[inverse].astype(np.int64)


def _agreement(sketches: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Equal sketch bytes of each pair; int64 [P]."""
    return _count_equal(sketches, np.ascontiguousarray(pairs, np.int64).reshape(-1, 2))


def _keep_greedily(pairs: np.ndarray, size: int) -> np.ndarray:
    """Keeper of each of `size` documents, given verified pairs; int64 [size]."""
    source = np.concatenate([pairs[:, 0], pairs[:, 1]])
    target = np.concatenate([pairs[:, 1], pairs[:, 0]])
    degree = np.bincount(source, minlength=size)
    neighbours = target[np.lexsort((target, source))]
    offsets = np.concatenate([[0], np.cumsum(degree)]).astype(np.int64)
    linked = np.flatnonzero(degree)
    order = linked[np.lexsort((linked, -degree[linked]))]
    return _visit(offsets, neighbours, order, size)


def _coefficients(count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` odd slopes and shifts (uint32), the same for ever: stored signatures stay usable."""
    state, drawn = 0x5261796C69676E, []
    for _ in range(2 * count):  # splitmix64 (Steele, Lea and Flood 2014)
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        drawn.append((z ^ (z >> 31)) >> 32)
    numbers = np.array(drawn, np.uint32)
    return numbers[:count] | np.uint32(1), numbers[count:]


@kernel
def _sign(words, offsets, slopes, shifts, ngram, bands, sketches, shingles):
    count, rows = slopes.shape[0], slopes.shape[0] // bands.shape[1]
    minima = np.empty(count, np.uint32)
    prime = np.uint64(0x9E3779B97F4A7C15)
    for document in range(len(offsets) - 1):
        first, size = offsets[document], offsets[document + 1] - offsets[document]
        width = min(ngram, size)
        shingles[document] = 0 if size == 0 else size - width + 1
        minima[:] = np.uint32(0xFFFFFFFF)
        for s in range(shingles[document]):
            value = np.uint64(0)
            for j in range(width):
                value = value * prime + words[first + s + j]
            top = np.uint32(mix(value) >> np.uint64(32))
            for j in range(count):
                minima[j] = min(minima[j], np.uint32(np.uint32(top * slopes[j]) + shifts[j]))
        for j in range(count):
            sketches[document, j] = np.uint8(minima[j] >> np.uint32(24)) ^ np.uint8(minima[j])
        for band in range(bands.shape[1]):
            key = np.uint64(band + 1)
            for j in range(rows):
                key = mix((key ^ np.uint64(minima[band * rows + j])) * prime)
            bands[document, band] = key


@kernel
def _pairs_of_runs(keys, members, large):
    """Pairs within runs of equal `keys` (sorted, with members ascending inside a run)."""
    total, i = 0, 0
    while i < len(keys):
        j = i
        while j < len(keys) and keys[j] == keys[i]:
            j += 1
        run = j - i
        total += run * (run - 1) // 2 if run <= large else run - 1
        i = j
    pairs = np.empty((total, 2), np.int64)
    at, i = 0, 0
    while i < len(keys):
        j = i
        while j < len(keys) and keys[j] == keys[i]:
            j += 1
        lefts = j if j - i <= large else i + 1
        for left in range(i, lefts):
            for right in range(left + 1, j):
                pairs[at, 0], pairs[at, 1] = members[left], members[right]
                at += 1
        i = j
    return pairs


@kernel
def _count_equal(sketches, pairs):
    agreed = np.zeros(len(pairs), np.int64)
    for p in range(len(pairs)):
        for j in range(sketches.shape[1]):
            agreed[p] += sketches[pairs[p, 0], j] == sketches[pairs[p, 1], j]
    return agreed


@kernel
def _visit(offsets, neighbours, order, size):
    """Keep each document, in order, unless a kept neighbour already stands for it."""
    keeper = np.arange(size)
    done = np.zeros(size, np.bool_)
    for document in order:
        if done[document]:
            continue
        done[document] = True
        for i in range(offsets[document], offsets[document + 1]):
            other = neighbours[i]
            if not done[other]:
                done[other] = True
                keeper[other] = document
    return keeper
