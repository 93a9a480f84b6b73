"""What a micro-batch trains and sees, and that dealing covers every row once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raylign.data.chat import Conversation
from raylign.data.packing import ShardWriter, write_index
from raylign.training.rows import (
    CorpusRows,
    DemonstrationRows,
    TextRows,
    assemble,
    deal,
    interleave,
    write_demonstrations,
)

SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    writer = ShardWriter(tmp_path, "train", 50)
    writer.write(np.arange(12).reshape(2, 6), SEGMENTS)
    write_index(tmp_path, 6, 50, "hash", {"train": writer})
    return tmp_path


def test_first_tokens_are_trained_only_where_something_precedes_them(shards: Path) -> None:
    isolated = CorpusRows(shards, "train", isolate=True).read([0, 1])
    assert isolated.tokens.tolist() == np.arange(12).reshape(2, 6).tolist()
    assert isolated.segments.tolist() == SEGMENTS.tolist()
    assert isolated.real_tokens == 11
    assert isolated.trained.astype(int).tolist() == [[0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 1, 1]]
    joined = CorpusRows(shards, "train", isolate=False).read([0, 1])
    assert joined.trained.astype(int).tolist() == [[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]


def test_rows_are_cut_into_shorter_ones(shards: Path) -> None:
    found = CorpusRows(shards, "train", isolate=True, length=3)
    assert found.count == 4
    rows = found.read([3, 1, 0])
    assert rows.tokens.tolist() == [[9, 10, 11], [3, 4, 5], [0, 1, 2]]
    assert rows.segments.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert rows.trained.astype(int).tolist() == [[0, 1, 1], [0, 1, 0], [0, 1, 1]]
    assert CorpusRows(shards, "train", isolate=True, length=2).read([1]).segments.tolist() == [
        [1, 2]
    ]


def test_demonstrations_come_back_from_their_rows(tmp_path: Path) -> None:
    stream = np.random.default_rng(0)
    conversations = []
    for number, length in enumerate([3, 5, 2, 7, 4, 1, 6]):
        ids = np.full(length, number, np.int32)
        conversations.append(Conversation(ids, stream.random(length) < 0.5))
    count = write_demonstrations(conversations, 8, 99, tmp_path, "train")
    rows = DemonstrationRows(tmp_path, "train")
    assert rows.count == count == 4  # 28 tokens in rows of 8
    found = rows.read(range(count))
    tokens, segments, trained = found.tokens, found.segments, found.trained
    assert ((segments == 0) == (tokens == 99)).all() and not trained[segments == 0].any()
    seen = {}
    for row in range(count):
        for segment in range(1, segments[row].max() + 1):
            here = np.flatnonzero(segments[row] == segment)
            assert (np.diff(here) == 1).all()
            number = int(tokens[row, here[0]])
            assert tokens[row, here].tolist() == conversations[number].token_ids.tolist()
            assert trained[row, here].tolist() == conversations[number].trained.tolist()
            seen[number] = True
    assert sorted(seen) == list(range(7))


def test_a_mask_is_made_only_where_documents_share_a_row() -> None:
    rows = TextRows(np.zeros((2, 6), np.int64), SEGMENTS, np.zeros((2, 6), bool))
    shared = assemble(rows, slice(0, 2), isolate=True)
    assert shared.attention_mask is not None and shared.position_ids is not None
    assert shared.attention_mask.shape == (2, 1, 6, 6)
    assert shared.position_ids.tolist()[0][:5] == [0, 1, 2, 0, 1]
    assert assemble(rows, slice(0, 2), isolate=False).attention_mask is None
    assert assemble(rows, slice(1, 2), isolate=True).attention_mask is None


def test_padding_that_no_row_needs_is_cut_off() -> None:
    segments = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    rows = TextRows(np.arange(20).reshape(4, 5), segments, segments > 0)
    short = assemble(rows, slice(0, 2), isolate=True)
    assert short.tokens.tolist() == [[0, 1, 2], [5, 6, 7]]
    assert short.trained.tolist() == [[True, True, False], [True, True, True]]
    assert assemble(rows, slice(0, 3), isolate=True).tokens.shape == (3, 5)
    assert assemble(rows, slice(3, 4), isolate=True).tokens.shape == (1, 2)


def test_no_rows_make_a_batch_that_trains_nothing() -> None:
    rows = TextRows(np.zeros((2, 6), np.int64), SEGMENTS, np.zeros((2, 6), bool))
    empty = assemble(rows, slice(2, 2), isolate=True)
    assert empty.tokens.shape == (1, 2) and not empty.trained.any()
    assert torch.equal(empty.to(torch.device("cpu")).tokens, empty.tokens)


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 8, 17, 64])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("micro_batch", [1, 3, 16])
def test_every_row_is_dealt_once_in_equally_many_pieces(
    rows: int, ranks: int, micro_batch: int
) -> None:
    hands = [deal(rows, rank, ranks, micro_batch) for rank in range(ranks)]
    assert len({len(hand) for hand in hands}) == 1
    dealt = [list(range(rows))[part] for hand in hands for part in hand]
    assert all(len(part) <= micro_batch for part in dealt)
    assert sorted(row for part in dealt for row in part) == list(range(rows))


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 8, 17, 64])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("micro_batch", [1, 3, 16])
def test_neighbours_are_dealt_to_different_ranks_at_the_same_time(
    rows: int, ranks: int, micro_batch: int
) -> None:
    hands = [interleave(rows, rank, ranks, micro_batch) for rank in range(ranks)]
    assert len({len(hand) for hand in hands}) == 1
    dealt = [[list(range(rows))[part] for part in hand] for hand in hands]
    assert all(len(part) <= micro_batch for hand in dealt for part in hand)
    assert sorted(row for hand in dealt for part in hand for row in part) == list(range(rows))
    for turn in zip(*dealt, strict=True):  # what is computed together is near to each other
        places = [row for part in turn for row in part]
        assert not places or max(places) - min(places) < ranks * (micro_batch + 1)


def test_rows_are_traced_to_the_users_file(tmp_path: Path, shards: Path) -> None:
    conversations = [
        Conversation(np.full(length, row, np.int32), np.ones(length, bool), row)
        for row, length in ((3, 4), (3, 3), (8, 8), (11, 1), (15, 5))
    ]
    count = write_demonstrations(conversations, 8, 99, tmp_path, "train")
    rows = DemonstrationRows(tmp_path, "train")
    for row in range(count):
        found = rows.read([row])
        held = found.tokens[found.segments > 0].tolist()
        assert rows.trace(row) == list(dict.fromkeys(held))
    assert CorpusRows(shards, "train", isolate=True).trace(0) == []


def test_no_rows_can_be_read(tmp_path: Path) -> None:
    """A rank that has none of the few validation rows still asks for its share."""
    conversation = Conversation(np.array([1, 2, 3], np.int32), np.array([False, True, True]))
    write_demonstrations([conversation], 6, 0, tmp_path, "validation")
    rows = DemonstrationRows(tmp_path, "validation")
    found = rows.read(range(rows.count)[slice(0, 0)])
    assert found.tokens.shape == found.segments.shape == found.trained.shape == (0, 6)
