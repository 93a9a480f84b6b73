"""Whole columns of text repaired and cleaned, at the cost of those texts alone that need it.

A kernel reads the bytes once and finds the texts that `clean_text` would change, and those that may
be UTF-8 once read in another encoding (`cafÃ©`). Only these become Python strings.
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylign.data.extraction.text import clean_text, is_special
from raylign.data.words import kernel, text_buffers

_UNCLEAN, _WESTERN_LEAD, _WESTERN_NEXT, _CYRILLIC_LEAD, _CYRILLIC_NEXT = 1, 2, 4, 8, 16
_CHANGES, _GARBLED = 1, 2


def polish(texts: pa.Array, usable: pa.Array) -> pa.Array:
    """`clean_text(repair(text))` of the texts (large_string) for which `usable` is true."""
    found = find_unclean(texts)
    found[~np.asarray(usable.to_numpy(zero_copy_only=False), bool)] = 0
    rows = np.flatnonzero(found)
    if not len(rows):
        return texts
    held = texts.take(pa.array(rows)).to_pylist()
    clean = [
        clean_text(repair(text) if flags & _GARBLED else text)
        for text, flags in zip(held, found[rows].tolist(), strict=True)
    ]
    return pc.replace_with_mask(texts, pa.array(found > 0), pa.array(clean, pa.large_string()))


def repair(text: str) -> str:
    """Text whose UTF-8 was read in another encoding, and written again, as it was meant.

    After R. Speer, ftfy; of its repairs only those of the encoding.
    """
    import ftfy

    return ftfy.fix_encoding(text)


def find_unclean(texts: pa.Array) -> np.ndarray:
    """uint8 [N]: 1 where `clean_text` may change the text, 2 where its encoding may be garbled."""
    data, offsets = text_buffers(texts)
    flags = np.zeros(len(offsets) - 1, np.uint8)
    _scan(data, offsets, _classify(), flags)
    return flags


@functools.cache
def _classify() -> np.ndarray:
    """uint8 [65536]: what is to be known of each character of the basic plane."""
    roles = np.zeros(1 << 16, np.uint8)
    seconds = _list_seconds()
    for code in range(1 << 16):
        char = chr(code)
        if 0xD800 <= code < 0xE000:
            continue
        if (
            is_special(char)
            or code in seconds
            or unicodedata.combining(char)
            or not unicodedata.is_normalized("NFC", char)
        ):
            roles[code] |= _UNCLEAN
    roles[0xC2:0xF5] |= _WESTERN_LEAD
    roles[0x80:0xC0] |= _WESTERN_NEXT
    for byte in range(0x80, 0xC0):
        western = bytes([byte]).decode("cp1252", "ignore")
        if western:
            roles[ord(western)] |= _WESTERN_NEXT
        cyrillic = bytes([byte]).decode("cp1251", "ignore")
        if cyrillic and cyrillic not in "\u00a0\u00ab\u00bb\u0401\u0451\u2013\u2014\u2026\u2116":
            roles[ord(cyrillic)] |= _CYRILLIC_NEXT
    for char in "\u0412\u0413\u0420\u0421\u0432":
        roles[ord(char)] |= _CYRILLIC_LEAD
    return roles


def _list_seconds() -> set[int]:
    """Characters that can join the one before them under NFC."""
    found = {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}
    for code in range(0x80, 0x30000):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            found.add(int(parts[1], 16))
    return found


@kernel
def _scan(data, offsets, roles, flags):
    for document in range(len(offsets) - 1):
        first, stop = offsets[document], offsets[document + 1]
        if first == stop:
            continue
        last = data[stop - 1]
        flag = 1 if data[first] == 10 or last == 10 or last == 32 or last == 9 else 0
        wanted = 0  # continuation characters that would complete a garbled one
        lead = 0
        i = first
        while i < stop:
            byte = data[i]
            if byte < 0x80:
                wanted = lead = 0
                if byte < 32:
                    if byte == 10:
                        if i > first and (data[i - 1] == 32 or data[i - 1] == 9):
                            flag |= 1
                        if i >= first + 2 and data[i - 1] == 10 and data[i - 2] == 10:
                            flag |= 1
                    elif byte != 9:
                        flag |= 1
                elif byte == 127:
                    flag |= 1
                i += 1
                continue
            if byte < 0xE0:
                code = (byte & 0x1F) << 6 | (data[i + 1] & 0x3F)
                i += 2
            elif byte < 0xF0:
                code = (byte & 0x0F) << 12 | (data[i + 1] & 0x3F) << 6 | (data[i + 2] & 0x3F)
                i += 3
            else:
                code = (
                    (byte & 0x07) << 18
                    | (data[i + 1] & 0x3F) << 12
                    | (data[i + 2] & 0x3F) << 6
                    | (data[i + 3] & 0x3F)
                )
                i += 4
                wanted = lead = 0
                # Emoji and rarer Chinese are always normal; the rest is left to Python.
                if not (0x1F000 <= code < 0x1FB00 or 0x20000 <= code < 0x2F800):
                    flag |= 1
                continue
            role = roles[code]
            flag |= role & 1
            if wanted and role & 4:
                wanted -= 1
                if wanted == 0:
                    flag |= 2
            elif lead and role & 16:
                flag |= 2
            elif role & 2:
                wanted = 1 if code < 0xE0 else (2 if code < 0xF0 else 3)
            else:
                wanted = 0
            lead = role & 8
        flags[document] = flag
