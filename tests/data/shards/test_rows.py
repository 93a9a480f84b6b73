"""Rows against packing token by token."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from raylign.config import UserError
from raylign.data.packing import pack
from raylign.data.shards.pack import divide_stream
from raylign.data.shards.rows import Pieces, concatenate, fit, lay

EOS, PAD = 1, 0


def draw_documents(seed: int, kind: type = np.uint16) -> list[np.ndarray]:
    """Lengths around a row of eight: empty, short, exact, long."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0, 1, 3, 6, 7, 8, 9, 30], rng.integers(1, 25))
    return [rng.integers(2, 99, size).astype(kind) for size in sizes]


def store(documents: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Documents in three files, in turn; which file and where in it each is."""
    homes = np.arange(len(documents)) % 3
    files, starts = [], np.zeros(len(documents), np.int64)
    for home in range(3):
        own = [documents[i] for i in np.flatnonzero(homes == home)]
        sizes = np.array([len(d) for d in own], np.int64)
        starts[homes == home] = np.cumsum(sizes) - sizes
        files.append(np.concatenate([np.empty(0, documents[0].dtype), *own]))
        files[-1].flags.writeable = False
    return files, homes, starts


def lay_out(
    documents: list[np.ndarray], pieces: Pieces, chosen: slice = slice(None)
) -> tuple[np.ndarray, np.ndarray]:
    files, homes, starts = store(documents)
    return lay(pieces, homes[chosen], starts[chosen], files.__getitem__, 8, EOS, PAD)


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("seed", range(10))
def test_shards_of_a_stream_are_the_rows_of_pack(seed: int, rows: int, kind: type) -> None:
    documents = draw_documents(seed, kind)
    lengths = np.array([len(d) + 1 for d in documents])
    found = []
    for shard in divide_stream("train", lengths, rows * 8, "concatenate"):
        own = slice(shard["low"], shard["high"])
        ends = shard["offset"] + np.cumsum(lengths[own])
        pieces = concatenate(lengths[own], ends, shard["first"], shard["stop"], 8)
        found.append(lay_out(documents, pieces, own))
    assert all(len(tokens) == rows for tokens, _ in found[:-1])
    expected = pack(documents, 8, EOS, PAD)
    for part in range(2):
        assert (np.concatenate([each[part] for each in found]) == expected[part]).all()
    assert found[0][0].dtype == kind and found[0][1].dtype == np.uint16


def read_segments(tokens: np.ndarray, segments: np.ndarray) -> list[list[int]]:
    """The tokens of every segment of every row."""
    return [
        row[marks == segment].tolist()
        for row, marks in zip(tokens, segments, strict=True)
        for segment in range(1, int(marks.max()) + 1)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_fitted_rows_hold_every_document_uncut_that_fits(seed: int) -> None:
    documents = draw_documents(seed)
    lengths = np.array([len(d) + 1 for d in documents])
    pieces = fit(lengths, np.arange(len(lengths)), 8)
    tokens, segments = lay_out(documents, pieces)
    expected = Counter()
    for document in documents:
        whole = [*document.tolist(), EOS]
        expected.update(tuple(whole[i : i + 8]) for i in range(0, len(whole), 8))
    assert Counter(map(tuple, read_segments(tokens, segments))) == expected
    assert (tokens[segments == 0] == PAD).all()
    for marks in segments.tolist():  # from the left, padding at the end
        real = [m for m in marks if m]
        assert marks == real + [0] * (8 - len(real)) and real == sorted(real) and real[0] == 1
    # No two rows could have been one.
    loads = sorted((segments > 0).sum(axis=1).tolist())
    assert len(loads) == 1 or sum(loads[:2]) > 8


def test_best_fit_by_hand() -> None:
    documents = [np.arange(10, 10 + n, dtype=np.uint16) for n in (4, 8, 2, 1)]
    pieces = fit(np.array([5, 9, 3, 2]), np.arange(4), 8)
    tokens, segments = lay_out(documents, pieces)
    # 8 + 1 of the second; 5 + 3; then 2 + 1. A row comes where its first document does.
    assert tokens.tolist() == [
        [10, 11, 12, 13, EOS, 10, 11, EOS],
        [10, 11, 12, 13, 14, 15, 16, 17],
        [EOS, 10, EOS, PAD, PAD, PAD, PAD, PAD],
    ]
    assert segments.tolist() == [
        [1, 1, 1, 1, 1, 2, 2, 2],
        [1] * 8,
        [1, 2, 2, 0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize("seed", range(20))
def test_copies_of_a_document_share_no_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 7, 12)
    chosen = rng.integers(0, 12, 40)
    pieces = fit(sizes[chosen], chosen, 16)
    rows = pieces.places // 16
    for row in range(pieces.rows):
        inside = chosen[pieces.copies[rows == row]]
        assert len(inside) == len(set(inside.tolist()))
        assert sizes[inside].sum() <= 16
    assert sorted(pieces.copies.tolist()) == list(range(40))


def test_windows_take_every_document_once() -> None:
    lengths = np.array([5, 9, 100, 1, 1, 40])
    shards = divide_stream("train", lengths, 16, "best_fit")
    assert [(s["low"], s["high"]) for s in shards] == [(0, 3), (3, 6)]
    assert [s["name"] for s in shards] == ["train-00000", "train-00001"]
    assert divide_stream("train", np.empty(0, np.int64), 16, "best_fit") == []


def test_too_many_documents_in_a_row() -> None:
    lengths = np.ones(65_536, np.int64)
    pieces = fit(lengths, np.arange(65_536), 65_536)
    empty = np.zeros(65_536, np.int64)
    with pytest.raises(UserError, match=r"prepare\.sequence_length=65536: .* more than 65,535"):
        lay(pieces, empty, empty, lambda _: np.empty(0, np.uint16), 65_536, EOS, PAD)
