"""Signs that are counted on the bytes: hash signs, ellipses, brackets, LaTeX, encoded data."""

from __future__ import annotations

import numpy as np

from raylign.data.words import kernel

NAMES = ("hashes", "ellipses", "curly_brackets", "latex_commands", "encoded", "encoded_longest")
"""Columns of `count_symbols`."""

MIN_ENCODED = 64
"""Characters of the shortest run of base64 that counts (Lozhkov et al. 2024, section 2)."""
MIN_HEX_BYTES = 8
"""Bytes of the shortest list of hexadecimal bytes that counts."""

_ALNUM, _BASE64, _HEX, _SEPARATOR = 1, 2, 4, 8


def _classify_bytes() -> np.ndarray:
    roles = np.zeros(256, np.uint8)
    for byte in b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
        roles[byte] |= _ALNUM | _BASE64
    for byte in b"+/":
        roles[byte] |= _BASE64
    for byte in b"0123456789abcdefABCDEF":
        roles[byte] |= _HEX
    for byte in b", \t\r\n":
        roles[byte] |= _SEPARATOR
    return roles


_ROLES = _classify_bytes()


def count_symbols(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int64 [D, len(NAMES)].

    Ellipses are "..." (not overlapping) and U+2026. Encoded are the characters in runs of at least
    `MIN_ENCODED` of [A-Za-z0-9+/], three quarters of them letters or digits, and in lists of at
    least `MIN_HEX_BYTES` bytes written 0x1f or \\x1f with blanks and commas between.
    """
    counts = np.zeros((len(offsets) - 1, len(NAMES)), np.int64)
    _count_signs(data, offsets, counts)
    _count_encoded(data, offsets, _ROLES, counts)
    return counts


@kernel
def _count_signs(data, offsets, counts):
    for document in range(len(offsets) - 1):
        first, stop = offsets[document], offsets[document + 1]
        hashes, brackets = 0, 0
        for i in range(first, stop):
            hashes += data[i] == 35
            brackets += data[i] == 123
        row = counts[document]
        row[0], row[2] = hashes, brackets
        dots = 0
        for i in range(first, stop):
            byte = data[i]
            if byte == 46:
                dots += 1
                row[1] += dots % 3 == 0
                continue
            dots = 0
            if byte == 92:
                after = data[i + 1] | 32 if i + 1 < stop else 0
                row[3] += 97 <= after <= 122
            elif byte == 0xE2 and data[i + 1] == 0x80 and data[i + 2] == 0xA6:
                row[1] += 1


@kernel
def _count_encoded(data, offsets, roles, counts):
    for document in range(len(offsets) - 1):
        first, stop = offsets[document], offsets[document + 1]
        row = counts[document]
        i = first
        while i + MIN_ENCODED <= stop:
            # The last byte of the window that belongs to no run: the next run starts after it.
            k = i + MIN_ENCODED - 1
            while k >= i and roles[data[k]] & _BASE64:
                k -= 1
            if k >= i:
                i = k + 1
                continue
            start, solid = i, 0
            while i < stop and roles[data[i]] & _BASE64:
                solid += roles[data[i]] & _ALNUM
                i += 1
            if 4 * solid >= 3 * (i - start):
                row[4] += i - start
                row[5] = max(row[5], i - start)
        i = first
        while i + 3 < stop:
            if not _is_hex_byte(data, i, stop, roles):
                i += 1
                continue
            start, end, listed = i, i, 0
            while _is_hex_byte(data, i, stop, roles):
                i += 4
                end = i
                listed += 1
                while i < stop and roles[data[i]] & _SEPARATOR:
                    i += 1
            if listed >= MIN_HEX_BYTES:
                row[4] += end - start
                row[5] = max(row[5], end - start)


@kernel
def _is_hex_byte(data, i, stop, roles):
    """0x1f or \\x1f at byte `i`."""
    return (
        i + 3 < stop
        and data[i + 1] == 120
        and (data[i] == 48 or data[i] == 92)
        and roles[data[i + 2]] & _HEX != 0
        and roles[data[i + 3]] & _HEX != 0
    )
