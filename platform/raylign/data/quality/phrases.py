"""Many phrases looked for at once in UTF-8 bytes (Aho and Corasick 1975)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raylign.data.words import kernel


@dataclass(frozen=True, slots=True, eq=False)
class Automaton:
    """Phrases as a machine of S states over B classes of bytes; ASCII letters may be folded."""

    classes: np.ndarray
    """uint8 [256]: class of a byte; 0 for bytes of no phrase."""
    moves: np.ndarray
    """uint32 [S * B]: by state and class, where the next state's row starts; row 0 is the start."""
    first: int
    """Where the rows of the states begin at whose bytes a phrase ends."""
    found: np.ndarray
    """int32 [S]: the phrase that ends in a state, or -1."""
    shorter: np.ndarray
    """int32 [S]: the state of the next shorter phrase that ends here too, or 0."""
    lengths: np.ndarray
    """int32 [P]: bytes of every phrase."""


def compile_phrases(phrases: Sequence[str], fold: bool = True) -> Automaton:
    """A machine that finds all `phrases` (not empty); with `fold` in any case of ASCII letters."""
    encoded = [_fold(phrase.encode()) if fold else phrase.encode() for phrase in phrases]
    alphabet = sorted(set(b"".join(encoded)))  # fewer than 256: UTF-8 never uses some bytes
    classes = np.zeros(256, np.uint8)
    for place, byte in enumerate(alphabet, 1):
        classes[byte] = place
        if fold and 97 <= byte <= 122:
            classes[byte - 32] = place
    trie: list[dict[int, int]] = [{}]
    found = [-1]
    for place, text in enumerate(encoded):
        state = 0
        for byte in text:
            kind = int(classes[byte])
            if kind not in trie[state]:
                trie[state][kind] = len(trie)
                trie.append({})
                found.append(-1)
            state = trie[state][kind]
        if found[state] < 0:
            found[state] = place
    width = len(alphabet) + 1
    moves, shorter = _link(trie, found, width)
    ends = (np.array(found) >= 0) | (shorter > 0)
    order = np.argsort(ends, kind="stable")  # those where a phrase ends come last
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return Automaton(
        classes,
        (rank[moves[order]] * width).astype(np.uint32).ravel(),
        int(len(order) - ends.sum()) * width,
        np.array(found, np.int32)[order],
        rank[shorter[order]].astype(np.int32),
        np.array([len(text) for text in encoded], np.int32),
    )


def _fold(text: bytes) -> bytes:
    return bytes(byte + 32 if 65 <= byte <= 90 else byte for byte in text)


def _link(
    trie: list[dict[int, int]], found: list[int], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The moves of every state, and the links to shorter phrases."""
    moves = np.zeros((len(trie), width), np.int32)
    fallback = np.zeros(len(trie), np.int32)
    shorter = np.zeros(len(trie), np.int32)
    for kind, child in trie[0].items():
        moves[0, kind] = child
    queue = deque(trie[0].values())
    while queue:
        state = queue.popleft()
        back = fallback[state]
        shorter[state] = back if found[back] >= 0 else shorter[back]
        moves[state] = moves[back]
        for kind, child in trie[state].items():
            fallback[child] = moves[back, kind]
            moves[state, kind] = child
            queue.append(child)
    return moves, shorter


def mark_spans(
    data: np.ndarray, starts: np.ndarray, stops: np.ndarray, automaton: Automaton, bits: np.ndarray
) -> np.ndarray:
    """uint64 [N]: the OR of the `bits` (uint64 [P]) of the phrases in each span of bytes."""
    marks = np.zeros(len(starts), np.uint64)
    machine = (automaton.classes, automaton.moves, automaton.first)
    ends = (automaton.found, automaton.shorter, len(automaton.moves) // len(automaton.found))
    _mark(data, starts, stops, *machine, *ends, bits.astype(np.uint64), marks)
    return marks


@kernel
def _mark(data, starts, stops, classes, moves, first, found, shorter, width, bits, marks):
    for span in range(len(starts)):
        state = np.uint32(0)
        for i in range(starts[span], stops[span]):
            state = moves[state + classes[data[i]]]
            if state >= first:
                at = np.int64(state) // width
                while at > 0:
                    if found[at] >= 0:
                        marks[span] |= bits[found[at]]
                    at = shorter[at]
