"""The words of many documents as 64-bit hashes, straight from Arrow buffers.

Duplicate search and decontamination see text through the same definition of a word:

- a run of ASCII letters and digits (letters lower-cased) and of non-ASCII bytes, except the block
  of typographic punctuation U+2000..U+203F, which separates;
- `+ - * / = . ,` between two digits belong to the word, so `3+5=8` and `3.5` are one word each and
  neither contains the word `5`;
- `+ - * / =` standing alone, after a blank and before no letter, digit or operator, is a word, so
  `3 + 5 =?` has four;
- every other byte separates.

Digits are kept as they are: pages that differ in their numbers only are not duplicates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np
import pyarrow as pa
import xxhash

_SEPARATOR, _LETTER, _DIGIT, _LEAD, _INNER, _OPERATOR, _BLANK = range(7)


def _classify_bytes() -> tuple[np.ndarray, np.ndarray]:
    """Byte to role, and byte to the byte that is hashed."""
    role = np.full(256, _SEPARATOR, np.uint8)
    folded = np.arange(256, dtype=np.uint8)
    role[128:] = _LETTER
    role[0xE2] = _LEAD  # may begin a typographic mark
    for letter in range(26):
        role[ord("a") + letter] = role[ord("A") + letter] = _LETTER
        folded[ord("A") + letter] = ord("a") + letter
    role[ord("0") : ord("9") + 1] = _DIGIT
    for byte in b"+-*/=":
        role[byte] = _OPERATOR
    for byte in b".,":
        role[byte] = _INNER
    for byte in b" \t\n\r\v\f":
        role[byte] = _BLANK
    return role, folded


ROLE, FOLDED = _classify_bytes()


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """Words of N documents, W in all."""

    hashes: np.ndarray
    """uint64 [W]"""
    offsets: np.ndarray
    """int64 [N + 1]: document d has the words offsets[d]..offsets[d + 1]."""
    starts: np.ndarray
    """int64 [W]: first byte of each word inside its document (UTF-8)."""
    ends: np.ndarray
    """int64 [W]: the byte after its last."""

    def of(self, document: int) -> np.ndarray:
        """Hashes of one document's words."""
        return self.hashes[self.offsets[document] : self.offsets[document + 1]]


def split_words(texts: pa.Array | pa.ChunkedArray | list[str]) -> Words:
    """Hash every word of every text; a null counts as an empty text."""
    data, offsets = text_buffers(texts)
    room = (len(data) + len(offsets)) // 2 + 1
    hashes = np.empty(room, np.uint64)
    starts, ends = np.empty(room, np.int64), np.empty(room, np.int64)
    word_offsets = np.zeros(len(offsets), np.int64)
    count = _scan(data, offsets, ROLE, FOLDED, hashes, starts, ends, word_offsets)
    return Words(hashes[:count], word_offsets, starts[:count], ends[:count])


def text_buffers(texts: pa.Array | pa.ChunkedArray | list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of all texts (uint8, not copied from an Arrow array) and their bounds (int64)."""
    if isinstance(texts, list):
        texts = pa.array(texts, pa.large_string())
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.cast(pa.large_string()).combine_chunks()
    _, bounds, data = texts.buffers()
    kind = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    if bounds is None or not len(texts):
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    offsets = np.frombuffer(bounds, kind)[texts.offset : texts.offset + len(texts) + 1]
    body = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    first = int(offsets[0])
    return body[first : int(offsets[-1])], offsets.astype(np.int64) - first


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` when it is first called, without the interpreter lock.

    The machine code is kept beside the source or in the user's cache; a read-only container that
    has neither compiles in every process instead of failing.
    """
    try:
        compiled = nb.njit(nogil=True, cache=True)(function)
        # numba looks at the function's own file alone, and would keep machine code that calls an
        # older version of a kernel in another file.
        compiled._cache._cache_file._source_stamp = _stamp_sources()
    except (RuntimeError, AttributeError):  # "cannot cache function: no locator available"
        return nb.njit(nogil=True)(function)
    return compiled


@functools.cache
def _stamp_sources() -> str:
    """Hash of all files of this package that hold kernels."""
    state = xxhash.xxh3_128()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        source = file.read_bytes()
        if b"@kernel" in source or b"@nb.njit" in source:
            state.update(source)
    return state.hexdigest()


@nb.njit(inline="always")
def mix(x):
    """MurmurHash3's 64-bit finaliser."""
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xFF51AFD7ED558CCD)
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xC4CEB9FE1A85EC53)
    x ^= x >> np.uint64(33)
    return x


@kernel
def _scan(data, offsets, role, folded, hashes, starts, ends, word_offsets):
    count = 0
    for document in range(len(offsets) - 1):
        count = scan_document(
            data,
            offsets[document],
            offsets[document + 1],
            role,
            folded,
            hashes,
            starts,
            ends,
            count,
        )
        word_offsets[document + 1] = count
    return count


@kernel
def scan_document(data, first, stop, role, folded, hashes, starts, ends, count):
    """Write the words of data[first:stop] from place `count` on; returns the place after them.

    `starts` and `ends` may be empty: then only the hashes are written.
    """
    prime, offset = np.uint64(0x100000001B3), np.uint64(0xCBF29CE484222325)
    places = len(starts) > 0
    begin = np.int64(-1)  # of the word that the scan is in
    value = offset
    i = first
    while i < stop:
        byte = data[i]
        kind = role[byte]
        if kind in (_LETTER, _DIGIT):
            if begin < 0:
                begin, value = i, offset
            value = (value ^ np.uint64(folded[byte])) * prime
            i += 1
            continue
        takes, width = kind == _LEAD, 1
        if kind == _LEAD:
            if i + 2 < stop and data[i + 1] == 0x80:
                takes, width = False, 3
        elif kind in (_OPERATOR, _INNER):
            before = role[data[i - 1]] if i > first else _BLANK
            after = role[data[i + 1]] if i + 1 < stop else _BLANK
            if before == _DIGIT and after == _DIGIT:
                takes = True
            elif kind == _OPERATOR and before == _BLANK and after in (_BLANK, _SEPARATOR, _INNER):
                hashes[count] = mix(np.uint64(byte) + np.uint64(1))
                if places:
                    starts[count], ends[count] = i - first, i + 1 - first
                count += 1
        if takes:
            if begin < 0:
                begin, value = i, offset
            value = (value ^ np.uint64(folded[byte])) * prime
        elif begin >= 0:
            hashes[count] = mix(value)
            if places:
                starts[count], ends[count] = begin - first, i - first
            count += 1
            begin = np.int64(-1)
        i += width
    if begin >= 0:
        hashes[count] = mix(value)
        if places:
            starts[count], ends[count] = begin - first, stop - first
        count += 1
    return count
