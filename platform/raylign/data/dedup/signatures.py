"""Signatures of documents: what is compared in place of their texts.

Exact copies share a 128-bit hash of the text without regard to case (ASCII) and white space. Near
ones are likely to share a *band*: a hash of a few MinHash minima over word n-grams (Broder 1997;
bands: Leskovec, Rajaraman and Ullman, chapter 3). A *sketch* keeps eight bits of every minimum
(Li and Koenig 2010), from which the Jaccard similarity of any two documents is estimated.

All numbers are fixed for ever, so signatures that were stored once stay comparable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raylign.config import DedupConfig
from raylign.data.words import FOLDED, ROLE, kernel, mix, scan_document, text_buffers

_MASK = (1 << 64) - 1
# Bytes as exact copies are compared by: ASCII in lower case, and all white space a blank.
_PLAIN = np.arange(256, dtype=np.uint8)
_PLAIN[ord("A") : ord("Z") + 1] += 32
_PLAIN[9:14] = 32


@dataclass(frozen=True, slots=True, eq=False)
class Signatures:
    """Signatures of N documents."""

    hashes: np.ndarray
    """uint64 [N, 2]: equal for exact copies."""
    bands: np.ndarray
    """uint64 [N, bands]: documents with an equal entry in a column are candidates."""
    sketches: np.ndarray
    """uint8 [N, bands * rows]: eight bits of each minimum, enough to estimate similarity."""
    shingles: np.ndarray
    """int64 [N]: n-grams of each document; without any it has no near-duplicates."""


def sign(texts: pa.Array | pa.ChunkedArray | list[str], config: DedupConfig) -> Signatures:
    """Signatures over n-grams of `config.ngram` words.

    A document with fewer words is one shingle.
    """
    data, offsets = text_buffers(texts)
    size, count = len(offsets) - 1, config.bands * config.rows
    bands = np.empty((size, config.bands), np.uint64)
    sketches = np.empty((size, count), np.uint8)
    shingles = np.empty(size, np.int64)
    slopes, shifts = _coefficients(count)
    words = np.empty(int(np.diff(offsets).max(initial=0)) // 2 + 2, np.uint64)
    _sign(
        data, offsets, ROLE, FOLDED, words, slopes, shifts, config.ngram, bands, sketches, shingles
    )
    return Signatures(hash_texts(texts), bands, sketches, shingles)


def hash_texts(texts: pa.Array | pa.ChunkedArray | list[str]) -> np.ndarray:
    """uint64 [N, 2], equal for texts that differ in ASCII case and white space only."""
    data, offsets = text_buffers(texts)
    hashes = np.empty((len(offsets) - 1, 2), np.uint64)
    room = np.zeros((int(np.diff(offsets).max(initial=0)) + 15) // 8 * 8, np.uint8)
    _hash(data, offsets, _PLAIN, room, hashes)
    return hashes


def needed_agreement(config: DedupConfig) -> int:
    """How many sketch bytes of a pair must agree for an estimate of at least the threshold."""
    share = config.threshold + (1 - config.threshold) / 256
    return math.ceil(config.bands * config.rows * share - 1e-9)


def estimate_jaccard(agreed: np.ndarray, count: int) -> np.ndarray:
    """Jaccard similarity from `agreed` of `count` equal sketch bytes; 1 in 256 agrees by chance."""
    return np.clip((agreed / count - 1 / 256) / (1 - 1 / 256), 0.0, 1.0).astype(np.float32)


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
def _hash(data, offsets, plain, room, hashes):
    """`room`: uint8, zeros, for the longest text and eight bytes more."""
    blocks = room.view(np.uint64)
    for document in range(len(offsets) - 1):
        size = _fold(data, offsets[document], offsets[document + 1], plain, room)
        one, two = np.uint64(size), ~np.uint64(size)
        for i in range((size + 7) // 8):
            one = (one ^ blocks[i]) * np.uint64(0x9E3779B97F4A7C15)
            one ^= one >> np.uint64(32)
            two = (two ^ blocks[i]) * np.uint64(0xC2B2AE3D27D4EB4F)
            two ^= two >> np.uint64(29)
        hashes[document, 0], hashes[document, 1] = mix(one), mix(two)


@kernel
def _fold(data, first, stop, plain, room):
    """Lower-case bytes with single blanks, none at either end, then zeros to a multiple of 8.

    Without branches: text is too irregular for them to be foreseen.
    """
    size, before = np.int64(0), np.int64(1)
    for i in range(first, stop):
        byte = plain[data[i]]
        blank = np.int64(byte == 32)
        room[size] = byte
        size += 1 - (blank & before)
        before = blank
    if size and before:
        size -= 1
    room[size : (size + 7) // 8 * 8] = 0
    return size


@kernel
def _sign(data, offsets, role, folded, words, slopes, shifts, ngram, bands, sketches, shingles):
    count, rows = slopes.shape[0], slopes.shape[0] // bands.shape[1]
    minima = np.empty(count, np.uint32)
    prime = np.uint64(0x9E3779B97F4A7C15)
    nowhere = np.empty(0, np.int64)
    for document in range(len(offsets) - 1):
        first, stop = offsets[document], offsets[document + 1]
        size = scan_document(data, first, stop, role, folded, words, nowhere, nowhere, 0)
        width = min(ngram, size)
        shingles[document] = 0 if size == 0 else size - width + 1
        minima[:] = np.uint32(0xFFFFFFFF)
        for s in range(shingles[document]):
            value = np.uint64(0)
            for j in range(width):
                value = value * prime + words[s + j]
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
