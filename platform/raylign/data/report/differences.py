"""Two texts beside each other: where they begin to differ, and which words do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher

EXCERPT_CHARS = 900
# Agreeing text that is shown before the first difference.
_LEAD_CHARS = 160
_PIECES = re.compile(r"\s+|\S+")
# Words longer than this are compared in pieces of it: hostile text has no blanks.
_WORD_CHARS = 40


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A part of a text."""

    text: str
    skipped: int
    """Characters before it."""
    changed: tuple[tuple[int, int], ...]
    """Spans [start, end) of `text` that the other one lacks."""


def compare(first: str, second: str) -> tuple[Excerpt, Excerpt]:
    """Excerpts of both that begin shortly before their first difference; the rest is clipped."""
    same = _count_same(first, second)
    equal = same == len(first) == len(second)
    begin = 0 if equal or same <= _LEAD_CHARS else same - _LEAD_CHARS
    # At the beginning of a word, where there is one nearby.
    blank = first.rfind(" ", max(0, begin - _WORD_CHARS), begin)
    begin = blank + 1 if blank > 0 else begin
    shown = [text[begin : begin + EXCERPT_CHARS] for text in (first, second)]
    pieces = [_cut(text) for text in shown]
    matcher = SequenceMatcher(None, pieces[0], pieces[1], autojunk=False)
    spans: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    starts = [_place(own) for own in pieces]
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind != "equal":
            for side, (low, high) in enumerate(((a, b), (c, d))):
                if high > low:
                    spans[side].append((starts[side][low], starts[side][high]))
    left, right = (Excerpt(text, begin, tuple(own)) for text, own in zip(shown, spans, strict=True))
    return left, right


def _count_same(first: str, second: str) -> int:
    """Length of the common beginning, by halving: slices compare faster than characters."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _cut(text: str) -> list[str]:
    words = _PIECES.findall(text)
    return [
        word[at : at + _WORD_CHARS] for word in words for at in range(0, len(word), _WORD_CHARS)
    ]


def _place(pieces: list[str]) -> list[int]:
    """Where each piece starts, and where the last one ends."""
    places = [0]
    for piece in pieces:
        places.append(places[-1] + len(piece))
    return places
