"""Lines and paragraphs as hashes, with their places.

What many pages share (menus, footers, notices) is no duplicate document, yet a model reads it once
for each page. Wenzek et al. 2020 (CCNet) and Penedo et al. 2023 (RefinedWeb) remove such lines.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raylign.config import LinesConfig
from raylign.data.words import kernel, mix, text_buffers


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """L pieces of N texts."""

    hashes: np.ndarray
    """uint64 [L]: equal for pieces that differ in ASCII case, digits and white space only."""
    documents: np.ndarray
    """int64 [L]"""
    spans: np.ndarray
    """int64 [L, 2]: first byte and end inside the document, line end included."""


def split_lines(texts: pa.Array | pa.ChunkedArray | list[str], config: LinesConfig) -> Places:
    """The lines (or paragraphs) of at least `min_chars` bytes that are not white space."""
    data, offsets = text_buffers(texts)
    room = int((data == ord("\n")).sum()) + len(offsets)
    hashes = np.empty(room, np.uint64)
    documents = np.empty(room, np.int64)
    spans = np.empty((room, 2), np.int64)
    used = _split(
        data, offsets, config.unit == "paragraph", config.min_chars, hashes, documents, spans
    )
    return Places(hashes[:used], documents[:used], spans[:used])


@kernel
def _split(data, offsets, paragraphs, least, hashes, documents, spans):
    used = 0
    for document in range(len(offsets) - 1):
        first, stop = offsets[document], offsets[document + 1]
        start = first
        while start < stop:
            end = start
            while end < stop:
                if data[end] == 10 and (not paragraphs or end + 1 >= stop or data[end + 1] == 10):
                    break
                end += 1
            after = end
            while after < stop and data[after] == 10:
                after += 1
                if not paragraphs:
                    break
            value, inked = _hash_piece(data, start, end)
            if inked >= least:
                hashes[used], documents[used] = value, document
                spans[used, 0], spans[used, 1] = start - first, after - first
                used += 1
            start = after
    return used


@kernel
def _hash_piece(data, start, end):
    value, inked = np.uint64(0xCBF29CE484222325), 0
    for i in range(start, end):
        byte = data[i]
        if byte == 32 or 9 <= byte <= 13:
            continue
        inked += 1
        if 65 <= byte <= 90:
            byte += np.uint8(32)
        if 48 <= byte <= 57:
            byte = np.uint8(48)
        value = (value ^ np.uint64(byte)) * np.uint64(0x100000001B3)
    return mix(value), inked


def find_repeated(
    hashes: np.ndarray, documents: np.ndarray, priority: np.ndarray, least: int
) -> np.ndarray:
    """Positions to cut: of each hash that `least` documents hold, all but those in the first.

    `hashes` is uint64 [L], `documents` and `priority` int64 [L]. The preferred document has the
    highest priority, then the lowest number; it keeps all its own. Returns int64, ascending.
    """
    order = np.lexsort((documents, -priority, hashes))
    return np.sort(order[_mark(hashes[order], documents[order], least)])


@kernel
def _mark(hashes, documents, least):
    """Sorted by hash, then preference: which places are cut."""
    cut = np.zeros(len(hashes), np.bool_)
    i = 0
    while i < len(hashes):
        j, different = i, 1
        while j < len(hashes) and hashes[j] == hashes[i]:
            if j > i and documents[j] != documents[j - 1]:
                different += 1
            j += 1
        if different >= least:
            for k in range(i, j):
                cut[k] = documents[k] != documents[i]
        i = j
    return cut
