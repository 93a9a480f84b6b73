"""Hashes of word n-grams: listing those of items, and finding them in documents.

An n-gram's hash starts from a polynomial of its words' hashes modulo 2**64. With the polynomials of
all prefixes of a document at hand, that of the n-gram at any place costs one multiplication,
however long it is. Each length has a blocked Bloom filter (Putze et al. 2007: all bits of a key in
one 64-bit word) that mostly stays in cache; only what passes it is looked up in the hash table.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from raylign.data.words import kernel, mix

_PRIME = np.uint64(0x9E3779B97F4A7C15)
_KEYS_IN_BLOCK = 4  # of 64 bits: 16 bits a key let about 1 % of foreign n-grams pass


def build_filters(hashes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(blocks uint64, firsts int64 [L], shifts uint64 [L]) for the polynomials of each length.

    Length number l has the blocks from firsts[l] on. The high bits of a polynomial p choose one,
    p >> shifts[l], and three times six low bits the bits in it.
    """
    bits = [max(1, (len(own) // _KEYS_IN_BLOCK).bit_length()) for own in hashes]
    firsts = np.cumsum([0, *(1 << b for b in bits)]).astype(np.int64)
    blocks = np.zeros(int(firsts[-1]), np.uint64)
    shifts = np.array([64 - b for b in bits], np.uint64)
    for own, first, shift in zip(hashes, firsts, shifts, strict=False):
        _fill(own, blocks, first, shift)
    return blocks, firsts[:-1], shifts


def build_table(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Open-addressing table of distinct hashes: (keys uint64, 0 is free; numbers int32)."""
    capacity = 1 << max(4, (2 * len(hashes)).bit_length())
    keys, numbers = np.zeros(capacity, np.uint64), np.zeros(capacity, np.int32)
    _insert(hashes, keys, numbers)
    return keys, numbers


def list_powers(lengths: np.ndarray) -> np.ndarray:
    """The prime to the power of each length; uint64."""
    return np.array([pow(int(_PRIME), int(n), 1 << 64) for n in lengths], np.uint64)


@nb.njit(inline="always")
def _finish(value, length):
    """Hash of an n-gram from its polynomial; never 0, which marks a free place of the table."""
    return mix(value + np.uint64(length)) | np.uint64(1)


@kernel
def hash_items(words, offsets, widths, polynomials, hashes, texts, places):
    """Every n-gram of `widths[t]` words of each text t: polynomial, hash, text and first word."""
    count = 0
    for text in range(len(widths)):
        width = widths[text]
        if width == 0:
            continue
        for i in range(offsets[text], offsets[text + 1] - width + 1):
            value = np.uint64(0)
            for j in range(width):
                value = value * _PRIME + words[i + j]
            polynomials[count], hashes[count] = value, _finish(value, width)
            texts[count], places[count] = text, i - offsets[text]
            count += 1
    return count


@kernel
def _fill(polynomials, blocks, first, shift):
    one, low = np.uint64(1), np.uint64(63)
    for value in polynomials:
        bits = one << (value & low)
        bits |= one << ((value >> np.uint64(6)) & low)
        bits |= one << ((value >> np.uint64(12)) & low)
        blocks[first + np.int64(value >> shift)] |= bits


@kernel
def _insert(hashes, keys, numbers):
    mask = np.uint64(len(keys) - 1)
    for number in range(len(hashes)):
        value = hashes[number]
        place = (value >> np.uint64(20)) & mask
        while keys[place] != 0:
            place = (place + np.uint64(1)) & mask
        keys[place], numbers[place] = value, number


@nb.njit(inline="always")
def _list_candidates(prefix, places, power, length, blocks, shift, candidates):
    """The first `places` places whose n-grams pass the filter; returns how many do.

    Without a branch that depends on the data: every place is written, and most are overwritten.
    """
    low, six, twelve = np.uint64(63), np.uint64(6), np.uint64(12)
    count = np.int64(0)
    for i in range(places):
        value = prefix[i + length] - prefix[i] * power
        block = blocks[value >> shift]
        passes = (block >> (value & low)) & (block >> ((value >> six) & low))
        passes &= block >> ((value >> twelve) & low)
        candidates[count] = i
        count += np.int64(passes & np.uint64(1))
    return count


@kernel
def search(words, offsets, lengths, powers, blocks, firsts, shifts, keys, numbers, found):
    """Write (document, first word, length, entry) rows; returns how many there are in all.

    Rows are in order of document, then length, then place.
    """
    mask = np.uint64(len(keys) - 1)
    longest = 0
    for document in range(len(offsets) - 1):
        longest = max(longest, offsets[document + 1] - offsets[document])
    prefix, candidates = np.empty(longest + 1, np.uint64), np.empty(longest + 1, np.int64)
    rows = 0
    for document in range(len(offsets) - 1):
        start = offsets[document]
        total = offsets[document + 1] - start
        value = np.uint64(0)
        prefix[0] = value
        for i in range(total):
            value = value * _PRIME + words[start + i]
            prefix[i + 1] = value
        for kind in range(len(lengths)):
            length, power, own = lengths[kind], powers[kind], blocks[firsts[kind] :]
            places = max(0, total - length + 1)
            count = _list_candidates(prefix, places, power, length, own, shifts[kind], candidates)
            for i in candidates[:count]:
                needle = _finish(prefix[i + length] - prefix[i] * power, length)
                place = (needle >> np.uint64(20)) & mask
                while keys[place] != 0 and keys[place] != needle:
                    place = (place + np.uint64(1)) & mask
                if keys[place] == needle:
                    if rows < len(found):
                        found[rows, 0] = document
                        found[rows, 1] = start + i
                        found[rows, 2] = length
                        found[rows, 3] = numbers[place]
                    rows += 1
    return rows
