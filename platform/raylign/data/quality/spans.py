"""Words and lines of many documents: what most metrics are counted on.

A word is a run of characters that are not white space; a line ends at a line feed, and white space
at its ends does not belong to it; lines without ink are left out. All positions are bytes of the
buffer, all lengths are characters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raylign.data.quality.characters import (
    ALNUM,
    ALPHA,
    CLOSER,
    DIGIT,
    LIMIT,
    LOWER,
    MATHS,
    SPACE,
    TERMINAL,
    classify_characters,
    read_character,
)
from raylign.data.words import kernel, mix

# Columns of `Spans.words`.
WORD_START, WORD_STOP, WORD_CHARS, WORD_BREAKS, WORD_EDGES = range(5)
# Bits of WORD_EDGES.
ENDS_SENTENCE, ENDS_IN_STOP, STARTS_LOWER = 1, 2, 4
# Columns of `Spans.lines`.
LINE_START, LINE_STOP, LINE_CHARS, LINE_WORDS, LINE_LONGEST, LINE_SENTENCES, LINE_OPENS = range(7)
# Columns of `Spans.totals`.
INK, SPACES, ALNUMS, DIGITS, SYMBOLS, ALPHA_WORDS, STOP_WORDS, NEWLINES, LONGEST_LINE, RAW_LINES = (
    range(10)
)

_PRIME, _BASIS = np.uint64(0x100000001B3), np.uint64(0xCBF29CE484222325)
_IDEOGRAPHIC = 0x3000
_FULL_STOP = 46


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Words and lines of D documents, W and L in all."""

    words: np.ndarray
    """int32 [W, 5]: start, stop, characters, sentences that end inside, bits of its edges."""
    word_hashes: np.ndarray
    """uint64 [W]"""
    word_offsets: np.ndarray
    """int64 [D + 1]"""
    lines: np.ndarray
    """int32 [L, 7]: start, stop, characters, words, characters of the longest word, sentences, and
    1 if it opens a paragraph."""
    line_hashes: np.ndarray
    """uint64 [L]"""
    line_offsets: np.ndarray
    """int64 [D + 1]"""
    totals: np.ndarray
    """int64 [D, 10]: counts of a whole document."""


def find_spans(data: np.ndarray, offsets: np.ndarray, stop_words: tuple[str, ...]) -> Spans:
    """Words and lines of the documents in `data` (UTF-8), bounded by `offsets` (int64 [D + 1])."""
    count = len(offsets) - 1
    room = (len(data) + count) // 2 + 1
    words, word_hashes = np.empty((room, 5), np.int32), np.empty(room, np.uint64)
    word_offsets, line_offsets = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    totals = np.zeros((count, 10), np.int64)
    hashes = [hash_letters(word) for word in stop_words]
    wanted = np.array([sum({1 << value % 64 for value in hashes}), *hashes], np.uint64)
    filled = _scan_words(
        data, offsets, classify_characters(), wanted, words, word_hashes, word_offsets, totals
    )
    words, word_hashes = words[:filled], word_hashes[:filled]
    room = int(np.count_nonzero(data == 10)) + count
    lines, line_hashes = np.empty((room, 7), np.int32), np.empty(room, np.uint64)
    filled = _scan_lines(
        data, offsets, words, word_hashes, word_offsets, lines, line_hashes, line_offsets, totals
    )
    lines, line_hashes = lines[:filled], line_hashes[:filled]
    return Spans(words, word_hashes, word_offsets, lines, line_hashes, line_offsets, totals)


def hash_letters(word: str) -> int:
    """The hash by which `_scan_words` knows a stop word."""
    value = int(_BASIS)
    for char in word:
        value = (value ^ ord(char)) * int(_PRIME) & 0xFFFFFFFFFFFFFFFF
    return value


@kernel
def _scan_words(data, offsets, classes, wanted, words, hashes, word_offsets, totals):
    count = 0
    for document in range(len(offsets) - 1):
        i, stop = offsets[document], offsets[document + 1]
        total = totals[document]
        found, digits, signs = np.uint64(0), 0, 0
        while i < stop:
            code, width = read_character(data, i)
            kind = classes[code] if code < LIMIT else 0
            if kind & SPACE:
                total[SPACES] += 1
                i += width
                continue
            words[count, WORD_START] = i
            edges = STARTS_LOWER if kind & LOWER else 0
            value, letters, full = _BASIS, _BASIS, False
            chars, breaks, ended, run, alnums, seen = 0, 0, 0, 0, 0, 0
            while not kind & SPACE:
                seen |= kind
                value = (value ^ np.uint64(code)) * _PRIME
                if kind & ALPHA:
                    if not run:
                        letters = _BASIS
                    run += 1
                    fold = 32 if 65 <= code <= 90 else 0
                    letters = (letters ^ np.uint64(code + fold)) * _PRIME
                elif run:
                    found |= _match(letters, wanted)
                    run = 0
                if kind & TERMINAL:
                    initial = code == _FULL_STOP and chars == 1 and alnums == 1
                    ended = 0 if initial else 2 if code >= _IDEOGRAPHIC else 1
                    full = code == _FULL_STOP
                elif not kind & CLOSER:
                    breaks += ended == 2
                    ended = 0
                alnums += (kind & ALNUM) != 0
                digits += (kind & DIGIT) != 0
                signs += (kind & MATHS) != 0
                chars += 1
                i += width
                if i >= stop:
                    break
                code, width = read_character(data, i)
                kind = classes[code] if code < LIMIT else 0
            if run:
                found |= _match(letters, wanted)
            words[count, WORD_STOP], words[count, WORD_CHARS] = i, chars
            if ended:
                edges |= ENDS_SENTENCE | (ENDS_IN_STOP if full else 0)
            words[count, WORD_BREAKS], words[count, WORD_EDGES] = breaks, edges
            hashes[count] = mix(value)
            count += 1
            total[INK] += chars
            total[ALNUMS] += alnums
            total[ALPHA_WORDS] += (seen & ALPHA) != 0
        total[STOP_WORDS], total[DIGITS], total[SYMBOLS] = _count_bits(found), digits, signs
        word_offsets[document + 1] = count
    return count


@kernel
def _match(letters, wanted):
    """The bit of the stop word with this hash, or 0; `wanted[0]` has a bit for every low part."""
    if not wanted[0] >> (letters & np.uint64(63)) & np.uint64(1):
        return np.uint64(0)
    for k in range(1, len(wanted)):
        if wanted[k] == letters:
            return np.uint64(1) << np.uint64(k - 1)
    return np.uint64(0)


@kernel
def _count_bits(value):
    count = 0
    while value:
        value &= value - np.uint64(1)
        count += 1
    return count


@kernel
def _scan_lines(
    data, offsets, words, hashes, word_offsets, lines, line_hashes, line_offsets, totals
):
    count = 0
    for document in range(len(offsets) - 1):
        total = totals[document]
        cursor, stop = offsets[document], offsets[document + 1]
        inside, feeds, raw = False, 2, 0
        last = word_offsets[document + 1]
        for word in range(word_offsets[document], last + 1):
            until = np.int64(words[word, WORD_START]) if word < last else stop
            gap, gap_hash = 0, _BASIS
            for k in range(cursor, until):
                byte = data[k]
                if byte == 10:
                    total[LONGEST_LINE] = max(total[LONGEST_LINE], raw)
                    total[NEWLINES] += 1
                    feeds += 1
                    raw, inside = 0, False
                else:
                    gap += (byte & 0xC0) != 0x80
                    raw += (byte & 0xC0) != 0x80
                    gap_hash = (gap_hash ^ np.uint64(byte)) * _PRIME
            if word == last:
                break
            if inside:
                line = lines[count - 1]
                line[LINE_CHARS] += gap
                line_hashes[count - 1] = (line_hashes[count - 1] ^ gap_hash) * _PRIME
                edges = words[word - 1, WORD_EDGES]
                goes_on = edges & ENDS_IN_STOP and words[word, WORD_EDGES] & STARTS_LOWER
                line[LINE_SENTENCES] += edges & ENDS_SENTENCE and not goes_on
            else:
                line = lines[count]
                line[:] = 0
                line[LINE_START], line[LINE_SENTENCES] = until, 1
                line[LINE_OPENS] = feeds > 1
                line_hashes[count] = _BASIS
                inside, feeds = True, 0
                count += 1
            cursor = np.int64(words[word, WORD_STOP])
            chars = words[word, WORD_CHARS]
            raw += chars
            line[LINE_STOP] = cursor
            line[LINE_CHARS] += chars
            line[LINE_WORDS] += 1
            line[LINE_LONGEST] = max(line[LINE_LONGEST], chars)
            line[LINE_SENTENCES] += words[word, WORD_BREAKS]
            line_hashes[count - 1] = mix(line_hashes[count - 1] ^ hashes[word])
        total[LONGEST_LINE] = max(total[LONGEST_LINE], raw)
        total[RAW_LINES] = total[NEWLINES] + (raw > 0)
        line_offsets[document + 1] = count
    return count
