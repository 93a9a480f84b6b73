from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from raylign.config import UserError
from raylign.data.packing import (
    PackedShards,
    ShardWriter,
    attention_mask,
    order,
    pack,
    pack_best_fit,
    pack_chunks,
    positions,
    rows_for_step,
    verify,
    write_index,
)

EOS, PAD = 1, 0


def draw_documents(seed: int) -> list[np.ndarray]:
    rng = random.Random(seed)
    return [
        np.array([rng.randint(2, 99) for _ in range(rng.choice([0, 1, 3, 7, 8, 9, 30]))], np.int64)
        for _ in range(rng.randint(0, 25))
    ]


def pack_slowly(
    documents: list[np.ndarray], length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Token by token."""
    tokens: list[list[int]] = []
    segments: list[list[int]] = []
    for document in documents:
        new = True
        for token in [*document.tolist(), EOS]:
            if not tokens or len(tokens[-1]) == length:
                tokens.append([])
                segments.append([])
                new = True
            last = segments[-1][-1] if segments[-1] else 0
            segments[-1].append(last + 1 if new else last)
            tokens[-1].append(token)
            new = False
    for row, marks in zip(tokens, segments, strict=True):
        row += [PAD] * (length - len(row))
        marks += [0] * (length - len(marks))
    return tokens, segments


@pytest.mark.parametrize("seed", range(20))
def test_pack_against_brute_force(seed: int) -> None:
    documents = draw_documents(seed)
    tokens, segments = pack(documents, 8, EOS, PAD)
    expected = pack_slowly(documents, 8)
    assert tokens.tolist() == expected[0]
    assert segments.tolist() == expected[1]
    flat = tokens.reshape(-1)[segments.reshape(-1) > 0]
    assert flat.tolist() == [t for d in documents for t in (*d.tolist(), EOS)]


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_chunks_are_the_rows_of_pack(rows: int) -> None:
    documents = draw_documents(3)
    whole = pack(documents, 8, EOS, PAD)
    chunks = list(pack_chunks(iter(documents), 8, EOS, PAD, rows))
    assert all(len(tokens) == rows for tokens, _ in chunks[:-1])
    for part in range(2):
        assert (np.concatenate([chunk[part] for chunk in chunks]) == whole[part]).all()


def test_pack_by_hand() -> None:
    tokens, segments = pack([np.array([5, 6]), np.array([7, 8, 9])], 4, EOS, PAD)
    assert tokens.tolist() == [[5, 6, EOS, 7], [8, 9, EOS, PAD]]
    assert segments.tolist() == [[1, 1, 1, 2], [1, 1, 1, 0]]
    assert pack([], 4, EOS, PAD)[0].shape == (0, 4)


@pytest.mark.parametrize("seed", range(10))
def test_best_fit_packs_everything_once_and_tightly(seed: int) -> None:
    rng = random.Random(seed)
    capacity = rng.randint(5, 60)
    lengths = [rng.randint(0, capacity) for _ in range(rng.randint(0, 200))]
    groups = pack_best_fit(lengths, capacity)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in group) for group in groups]
    assert all(load <= capacity for load in loads)
    # What best-fit decreasing guarantees, and that no two groups could have been one.
    least = -(-sum(lengths) // capacity)
    assert len(groups) <= max(1, 11 / 9 * least + 1) or sum(sorted(loads)[:2]) > capacity


def test_best_fit_chooses_the_fullest_group_that_fits() -> None:
    assert pack_best_fit([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]
    assert pack_best_fit([10, 1, 9], 10) == [[0], [2, 1]]
    with pytest.raises(ValueError, match="item 1 has length 11"):
        pack_best_fit([3, 11], 10)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 17, 100, 1000])
def test_order_is_a_permutation_that_changes_with_seed_and_epoch(rows: int) -> None:
    first = order(rows, 0, 0)
    assert sorted(first.tolist()) == list(range(rows))
    assert (first == order(rows, 0, 0)).all()
    if rows >= 100:
        for other in (order(rows, 1, 0), order(rows, 0, 1)):
            assert (first != other).mean() > 0.9


def test_order_mixes_like_a_random_permutation() -> None:
    rows = 4096
    places = order(rows, 7, 0)
    # Neighbours land far apart (mean rows / 3), and position says nothing about destination.
    assert abs(np.abs(np.diff(places)).mean() / (rows / 3) - 1) < 0.05
    assert abs(np.corrcoef(np.arange(rows), places)[0, 1]) < 0.06
    fixed = [(order(rows, seed, 0) == np.arange(rows)).sum() for seed in range(50)]
    assert np.mean(fixed) < 3  # one is expected


@pytest.mark.parametrize(("rows", "batch"), [(10, 3), (10, 10), (7, 20), (1, 4), (64, 8)])
def test_steps_walk_through_the_epochs(rows: int, batch: int) -> None:
    steps = 12
    epochs = steps * batch // rows + 2
    endless = np.concatenate([order(rows, 5, epoch) for epoch in range(epochs)])
    for step in range(steps):
        expected = endless[step * batch : (step + 1) * batch]
        assert (rows_for_step(rows, 5, step, batch) == expected).all()


def test_a_step_reads_the_same_rows_however_it_is_divided() -> None:
    """Two batches of 8 are the rows of four batches of 4: rank and accumulation counts are free."""
    whole = rows_for_step(50, 0, 3, 16)
    parts = [rows_for_step(50, 0, 3 * 4 + i, 4) for i in range(4)]
    assert (whole == np.concatenate(parts)).all()
    with pytest.raises(ValueError, match="no rows"):
        rows_for_step(0, 0, 0, 4)


@pytest.mark.parametrize("start", [0, 1, 5, 17])
def test_any_number_of_ranks_reads_the_same_from_any_step(tmp_path: Path, start: int) -> None:
    """Every rank opens the shards for itself and reads its own part of each step's rows."""
    write_shards(tmp_path)
    alone = PackedShards(tmp_path)
    for ranks in (1, 2, 3, 4):
        shards = [PackedShards(tmp_path) for _ in range(ranks)]
        for step in range(start, start + 4):
            rows = rows_for_step(alone.rows, 9, step, 12)
            parts = [own.read(rows[r::ranks]) for r, own in enumerate(shards)]
            union = sorted(row for tokens, _ in parts for row in tokens.tolist())
            assert union == sorted(alone.read(rows)[0].tolist())
            assert len(union) == 12


def test_attention_mask_against_brute_force() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 3, 0, 0, 0], [0] * 6, [1] * 6])
    mask = attention_mask(segments)
    assert mask.shape == (4, 1, 6, 6) and mask.dtype == torch.bool
    for b, row in enumerate(segments.tolist()):
        for t in range(6):
            for s in range(6):
                expected = s == t or (s < t and row[s] == row[t] != 0)
                assert bool(mask[b, 0, t, s]) == expected
    assert torch.isfinite(torch.zeros(4, 1, 6, 6).masked_fill(~mask, -torch.inf).softmax(-1)).all()


def test_positions_against_brute_force() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 2, 0, 0], [1, 2, 3, 3, 0, 0, 0], [1] * 7])
    for row, found in zip(segments.tolist(), positions(segments).tolist(), strict=True):
        expected: list[int] = []
        for t, segment in enumerate(row):
            expected.append(expected[-1] + 1 if t and row[t - 1] == segment else 0)
        assert found == expected


def test_packed_attention_equals_documents_on_their_own() -> None:
    """The point of masks and positions: packing changes nothing that a document computes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            initializer_range=0.3,
        )
    ).eval()
    documents = [np.array([3, 4, 5]), np.array([6, 7]), np.array([8, 9, 10, 11])]
    tokens, segments = (torch.from_numpy(x.astype(np.int64)) for x in pack(documents, 16, EOS, PAD))
    with torch.no_grad():
        packed = model(
            tokens, attention_mask=attention_mask(segments), position_ids=positions(segments)
        ).logits[0]
        start = 0
        for document in documents:
            alone = model(torch.tensor([[*document.tolist(), EOS]])).logits[0]
            torch.testing.assert_close(packed[start : start + len(alone)], alone)
            start += len(alone)


def write_shards(directory: Path, vocab_size: int = 100) -> tuple[np.ndarray, np.ndarray]:
    tokens, segments = pack([np.arange(2, 40), np.arange(5, 50), np.arange(3, 9)], 8, EOS, PAD)
    writers = {s: ShardWriter(directory, s, vocab_size) for s in ("train", "validation")}
    for start in range(0, len(tokens), 5):
        writers["train"].write(tokens[start : start + 5], segments[start : start + 5])
    write_index(directory, 8, vocab_size, "hash", writers)
    return tokens, segments


@pytest.mark.parametrize(("vocab_size", "dtype"), [(100, "uint16"), (70_000, "uint32")])
def test_shards_give_back_what_was_written(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    tokens, segments = write_shards(tmp_path, vocab_size)
    shards = PackedShards(tmp_path)
    assert (shards.rows, shards.sequence_length, shards.vocab_size) == (len(tokens), 8, vocab_size)
    assert shards.tokens == int((segments > 0).sum()) == 38 + 45 + 6 + 3
    assert np.load(tmp_path / "train-00000.tokens.npy").dtype == dtype
    for indices in ([0], [11, 4, 5, 0, 4], list(range(len(tokens))), []):
        read = shards.read(indices)
        assert (read[0] == tokens[indices]).all() and (read[1] == segments[indices]).all()
        assert read[0].dtype == read[1].dtype == np.int64
    with pytest.raises(IndexError):
        shards.read([len(tokens)])
    with pytest.raises(IndexError):
        shards.read([-1])
    assert PackedShards(tmp_path, "validation").rows == 0


def test_damaged_shards_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no index\.json"):
        PackedShards(tmp_path)
    write_shards(tmp_path)
    assert verify(tmp_path) == []
    with pytest.raises(UserError, match="damaged"):
        PackedShards(tmp_path, "test")
    file = tmp_path / "train-00001.tokens.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"train-00001\.tokens\.npy cannot be read \(188 bytes"):
        PackedShards(tmp_path)
    assert verify(tmp_path) == [file.name]
    # The right size and wrong bytes: opening is cheap and does not notice, `verify` does.
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    PackedShards(tmp_path).read([0])
    assert verify(tmp_path) == [file.name]
    # A header that says something else.
    file.write_bytes(whole.replace(b"(5, 8)", b"(4, 8)"))
    with pytest.raises(UserError, match=r"train-00001\.tokens\.npy cannot be read \(shape"):
        PackedShards(tmp_path).read([7])
    file.unlink()
    with pytest.raises(UserError, match=r"train-00001\.tokens\.npy cannot be read \(No such"):
        PackedShards(tmp_path)
    (tmp_path / "train-00000.segments.npy").unlink()
    assert verify(tmp_path) == ["train-00000.segments.npy", file.name]
    (tmp_path / "index.json").write_text('{"splits": {"train": {"shards": [{"name": 1}]}}}')
    with pytest.raises(UserError, match="damaged"):
        PackedShards(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        verify(tmp_path)


def test_more_shards_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylign.data.packing.OPEN_SHARDS", 1)
    tokens, segments = write_shards(tmp_path)
    shards = PackedShards(tmp_path)
    for indices in (range(len(tokens)), [11, 0, 10, 1, 11]):
        read = shards.read(list(indices))
        assert (read[0] == tokens[indices]).all() and (read[1] == segments[indices]).all()
