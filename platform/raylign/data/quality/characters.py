"""What each Unicode character is, as bits in one table for the kernels."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import numpy as np

from raylign.data.words import kernel

SPACE, ALNUM, ALPHA, DIGIT, TERMINAL, MATHS, LOWER, CLOSER = (1 << bit for bit in range(8))

LIMIT = 0x33480
"""Characters from here on (private use, tags) have no bits: they are ink and nothing else."""

TERMINALS = (
    ".!?\u203c\u203d\u2047\u2048\u2049"
    "\u3002\uff0e\uff01\uff1f\uff61\ufe52\ufe56\ufe57"  # Chinese, Japanese, Korean
    "\u061f\u06d4\u061d\u0700\u0701\u0702"  # Arabic, Syriac
    "\u0964\u0965\u0df4"  # Indic
    "\u0589\u1362\u1367\u1368\u104a\u104b\u17d4\u17d5\u0e5b"  # Armenian, Ethiopic, Burmese, Khmer
)
"""Characters that end a sentence."""
CLOSERS = "\"')]}\u2019\u201d\u201c\u00bb\u300d\u300f\uff09\u3011"
"""Quotation marks and brackets that may follow the end of a sentence."""
NOT_MATHS = "<>|~"
"""Symbols that Unicode counts as mathematical, and web pages use for menus."""


@lru_cache(maxsize=1)
def classify_characters() -> np.ndarray:
    """uint8 [LIMIT]: bits of every character.

    SPACE, ALNUM, ALPHA and LOWER are Python's `isspace`, `isalnum`, `isalpha` and `islower`; DIGIT
    is category Nd; MATHS is category Sm without `NOT_MATHS`.
    """
    kinds = np.zeros(LIMIT, np.uint8)
    for code in range(LIMIT):
        char = chr(code)
        category = unicodedata.category(char)
        if category == "Cn":
            continue
        kinds[code] = (
            SPACE * char.isspace()
            | ALNUM * char.isalnum()
            | ALPHA * char.isalpha()
            | DIGIT * (category == "Nd")
            | TERMINAL * (char in TERMINALS)
            | MATHS * (category == "Sm" and char not in NOT_MATHS)
            | LOWER * char.islower()
            | CLOSER * (char in CLOSERS)
        )
    return kinds


@kernel
def read_character(data, i):
    """Code point and width in bytes of the character that starts at byte `i` of valid UTF-8."""
    byte = np.int64(data[i])
    if byte < 0x80:
        return byte, 1
    if byte < 0xE0:
        return (byte & 0x1F) << 6 | (data[i + 1] & 0x3F), 2
    if byte < 0xF0:
        return (byte & 0x0F) << 12 | (data[i + 1] & 0x3F) << 6 | (data[i + 2] & 0x3F), 3
    return (
        (byte & 0x07) << 18
        | (data[i + 1] & 0x3F) << 12
        | (data[i + 2] & 0x3F) << 6
        | (data[i + 3] & 0x3F)
    ), 4
