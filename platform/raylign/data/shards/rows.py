"""Pieces of documents to rows of tokens and segments, in compiled loops.

A piece is a run of tokens of one document with a place in the flat rows of a shard. Concatenating
and best-fit differ in the pieces alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from raylign.config import UserError
from raylign.data.packing import pack_best_fit
from raylign.data.words import kernel


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """P pieces in the order of their places; all int64 [P] but `ends`."""

    copies: np.ndarray
    """Which of the shard's documents each is of."""
    starts: np.ndarray
    """First token inside the document."""
    counts: np.ndarray
    """Tokens, without `<eos>`."""
    ends: np.ndarray
    """bool [P]: whether `<eos>` follows."""
    places: np.ndarray
    """Flat position of the first token in the shard's rows."""
    rows: int
    """Rows that they take."""


def concatenate(
    lengths: np.ndarray, ends: np.ndarray, first: int, stop: int, row_length: int
) -> Pieces:
    """Tokens `first` to `stop` of a stream of documents, one after the other.

    `lengths` int64 [C] (with `<eos>`) and `ends` int64 [C] (in the stream, cumulative) are those
    of the documents that reach into the range.
    """
    begins = ends - lengths
    low, high = np.maximum(begins, first), np.minimum(ends, stop)
    last = high == ends
    return Pieces(
        copies=np.arange(len(lengths)),
        starts=low - begins,
        counts=high - low - last,
        ends=last,
        places=low - first,
        rows=-(-(stop - first) // row_length),
    )


def fit(lengths: np.ndarray, documents: np.ndarray, row_length: int) -> Pieces:
    """Documents cut only where they are longer than a row, and the pieces fitted into rows.

    Best-fit decreasing (Ding et al. 2024, "Fewer truncations improve language modeling"); copies of
    one document (equal numbers in `documents` [C]) are then moved out of each other's rows. Rows
    follow the order of their first pieces. `lengths` int64 [C] count `<eos>`.
    """
    cuts = -(-lengths // row_length)
    copies = np.repeat(np.arange(len(lengths)), cuts)
    ranks = np.arange(len(copies)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    starts = ranks * row_length
    sizes = np.minimum(lengths[copies] - starts, row_length)
    groups = pack_best_fit(sizes.tolist(), row_length)
    _separate(groups, documents[copies], sizes, row_length)
    groups = sorted(sorted(group) for group in groups)
    order = np.array([item for group in groups for item in group], np.int64)
    counts = np.array([len(group) for group in groups], np.int64)
    # Where each piece begins: its row, and the pieces before it in that row.
    taken = np.cumsum(sizes[order]) - sizes[order]
    heads = np.repeat(taken[np.cumsum(counts) - counts], counts)
    places = np.repeat(np.arange(len(groups)), counts) * row_length + taken - heads
    last = starts[order] + sizes[order] == lengths[copies[order]]
    return Pieces(copies[order], starts[order], sizes[order] - last, last, places, len(groups))


def _separate(groups: list[list[int]], documents: np.ndarray, sizes: np.ndarray, room: int) -> None:
    """Move items of one document into different groups, into new ones where none has the room."""
    if len(np.unique(documents)) == len(documents):
        return
    names, lengths = documents.tolist(), sizes.tolist()
    moved: list[int] = []
    for group in groups:
        seen: set[int] = set()
        for item in list(group):
            if names[item] in seen:
                group.remove(item)
                moved.append(item)
            seen.add(names[item])
    rooms = [room - sum(lengths[item] for item in group) for group in groups]
    for item in moved:
        for number, group in enumerate(groups):
            if rooms[number] >= lengths[item] and all(names[i] != names[item] for i in group):
                group.append(item)
                rooms[number] -= lengths[item]
                break
        else:
            groups.append([item])
            rooms.append(room - lengths[item])


def lay(
    pieces: Pieces,
    files: np.ndarray,
    starts: np.ndarray,
    load: Callable[[int], np.ndarray],
    row_length: int,
    eos: int,
    pad: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (of the type of the token files) and segments uint16 [rows, row_length].

    `files` and `starts` [C] say where each document's tokens are; `load` maps a file by number.
    Segments count from 1 in every row; 0 marks padding. Raises `UserError` for a row of more than
    65,535 documents.
    """
    homes = files[pieces.copies]
    order = np.argsort(homes, kind="stable")
    bounds = np.flatnonzero(np.diff(homes[order])) + 1
    sources = starts[pieces.copies] + pieces.starts
    size = pieces.rows * row_length
    tokens = np.full(size, pad, load(int(homes[0])).dtype)
    for chosen in np.split(order, bounds):
        source = load(int(homes[chosen[0]]))
        _copy(source, sources[chosen], pieces.counts[chosen], pieces.places[chosen], tokens)
    tokens[(pieces.places + pieces.counts)[pieces.ends]] = eos
    segments = np.zeros(size, np.uint16)
    if _number(pieces.places, pieces.counts + pieces.ends, row_length, segments) > 65_535:
        raise UserError(
            f"prepare.sequence_length={row_length}: a row has more than 65,535 documents; lower it"
        )
    return tokens.reshape(-1, row_length), segments.reshape(-1, row_length)


@kernel
def _copy(source, starts, counts, places, target):
    for i in range(len(starts)):
        for j in range(counts[i]):
            target[places[i] + j] = source[starts[i] + j]


@kernel
def _number(places, counts, row_length, segments):
    """Write the segment of every token; returns the largest."""
    segment = largest = 0
    for i in range(len(places)):
        for place in range(places[i], places[i] + counts[i]):
            if place % row_length == 0:
                segment = 1
            elif place == places[i]:
                segment += 1
            segments[place] = segment
        largest = max(largest, segment)
    return largest
