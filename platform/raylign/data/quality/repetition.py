"""How much of a document repeats itself: lines, paragraphs and runs of words.

The definitions are those of Rae et al. 2021 ("Gopher"), table A1: a line or paragraph is a
duplicate if it occurred before; the most frequent n-gram counts with all its occurrences; repeated
n-grams are counted from the front, and characters inside two of them only once.
"""

from __future__ import annotations

import numpy as np

from raylign.data.quality.spans import LINE_CHARS, LINE_OPENS, WORD_CHARS, Spans
from raylign.data.words import kernel, mix

NAMES = (
    "line_repeat_share",
    "duplicate_line_char_share",
    "duplicate_char_share",
    "duplicate_paragraph_share",
    "duplicate_paragraph_char_share",
    *(f"top_{n}gram_char_share" for n in (2, 3, 4)),
    *(f"duplicate_{n}gram_char_share" for n in range(5, 11)),
)
"""Columns of `measure_repetition`."""

_TOP, _LONGEST_TOP, _LONGEST = 2, 4, 10
_PRIME = np.uint64(0x9E3779B97F4A7C15)


def measure_repetition(spans: Spans, chars: np.ndarray, newlines: np.ndarray) -> np.ndarray:
    """float64 [D, len(NAMES)], from the documents' characters and line feeds (int64 [D])."""
    result = np.zeros((len(chars), len(NAMES)))
    most = max(
        int(np.diff(spans.word_offsets).max(initial=0)),
        int(np.diff(spans.line_offsets).max(initial=0)),
    )
    size = 1 << (2 * most + 1).bit_length()
    keys, owners = np.empty(size, np.uint64), np.empty(size, np.int32)
    ages = np.zeros(size, np.int64)
    table = (keys, owners, ages)
    _measure_lines(
        spans.lines, spans.line_hashes, spans.line_offsets, chars, newlines, table, result
    )
    _measure_ngrams(spans.words, spans.word_hashes, spans.word_offsets, chars, table, result)
    return result


@kernel
def _look_up(table, key, age, owner, mask):
    """The owner of `key` in the set of this age: `owner` itself when it is the first."""
    keys, owners, ages = table
    slot = np.int64(key >> np.uint64(20)) & mask
    while ages[slot] == age:
        if keys[slot] == key:
            return owners[slot]
        slot = (slot + 1) & mask
    ages[slot], keys[slot], owners[slot] = age, key, owner
    return owner


@kernel
def _fit(count):
    """A mask for a set of `count` keys that leaves half of its slots empty."""
    size = 2
    while size < 2 * count:
        size *= 2
    return size - 1


@kernel
def _measure_lines(lines, hashes, offsets, chars, newlines, table, result):
    age = 0
    for document in range(len(chars)):
        first, last = offsets[document], offsets[document + 1]
        mask = _fit(last - first + 1)
        repeats, repeat_chars, age = 0, 0, age + 1
        for line in range(first, last):
            if _look_up(table, hashes[line], age, line, mask) != line:
                repeats += 1
                repeat_chars += lines[line, LINE_CHARS]
        if last > first:
            result[document, 0] = repeats / (last - first)
            result[document, 1] = repeat_chars / chars[document]
            result[document, 2] = repeat_chars / (chars[document] - newlines[document])
        repeats, repeat_chars, age, paragraphs, line = 0, 0, age + 1, 0, first
        while line < last:
            start, length, value = line, -1, np.uint64(0)
            while line < last and (line == start or not lines[line, LINE_OPENS]):
                length += lines[line, LINE_CHARS] + 1
                value = mix(value * _PRIME + hashes[line])
                line += 1
            paragraphs += 1
            if _look_up(table, value, age, start, mask) != start:
                repeats += 1
                repeat_chars += length
        if paragraphs:
            result[document, 3] = repeats / paragraphs
            result[document, 4] = repeat_chars / chars[document]
    table[2][:] = 0


@kernel
def _measure_ngrams(words, hashes, offsets, chars, table, result):
    age = 0
    longest = 0
    for document in range(len(chars)):
        longest = max(longest, offsets[document + 1] - offsets[document])
    grams, counts = np.empty(longest, np.uint64), np.empty(longest, np.int64)
    before = np.zeros(longest + 1, np.int64)
    for document in range(len(chars)):
        first, count = offsets[document], offsets[document + 1] - offsets[document]
        mask = _fit(count + 1)
        for i in range(count):
            grams[i] = hashes[first + i]
            before[i + 1] = before[i] + words[first + i, WORD_CHARS]
        for n in range(_TOP, _LONGEST + 1):
            places = count - n + 1
            if places < 2:
                break
            for i in range(places):
                grams[i] = mix(grams[i] * _PRIME + hashes[first + i + n - 1])
            age += 1
            if n <= _LONGEST_TOP:
                found = _measure_top(grams, counts, before, n, places, table, age, mask)
            else:
                found = _measure_duplicates(grams, before, n, places, table, age, mask)
            if not found:
                break  # no longer n-gram can repeat either
            result[document, 3 + n] = found / chars[document]


@kernel
def _measure_top(grams, counts, before, n, places, table, age, mask):
    """Characters (blanks between words included) in the most frequent n-gram, the first such; 0
    when none repeats."""
    most, best = 1, 0
    for i in range(places):
        counts[i] = 0
        owner = _look_up(table, grams[i], age, i, mask)
        counts[owner] += 1
        if counts[owner] > most or (counts[owner] == most and owner < best):
            most, best = counts[owner], owner
    return most * (before[best + n] - before[best] + n - 1) if most > 1 else 0


@kernel
def _measure_duplicates(grams, before, n, places, table, age, mask):
    """Characters in n-grams that occurred before."""
    found, i = 0, 0
    while i < places:
        if _look_up(table, grams[i], age, i, mask) != i:
            found += before[i + n] - before[i]
            i += n
        else:
            i += 1
    return found
