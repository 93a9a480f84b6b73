"""Documents laid into rows of equal length, and the order in which training reads them.

Pre-training rows are documents one after the other, cut where a row is full; demonstrations are
never cut but fitted. Either way a row says for every token which document it belongs to (its
segment; 0 is padding), so that attention and positions can stay inside documents.

What a step reads is a pure function of (seed, step). A resumed run, or one with another number of
ranks, therefore reads exactly what the first would have read.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from raylign.config import UserError
from raylign.run import hash_file, write_json
from raylign.runtime import derive_seed

if TYPE_CHECKING:
    import torch

INDEX = "index.json"
SPLITS = ("train", "validation")
OPEN_SHARDS = 256

_ROUNDS = 6


def pack(
    documents: Iterable[np.ndarray], sequence_length: int, eos: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate documents, each followed by `eos`, and split into rows.

    Returns tokens int64 [rows, T] and segments uint16 [rows, T]. A document cut over two rows has a
    segment in both. Segments count from 1 in every row; 0 marks the padding (`pad`) of the last.
    """
    chunks = list(pack_chunks(documents, sequence_length, eos, pad, rows=1024))
    if not chunks:
        empty = np.empty((0, sequence_length))
        return empty.astype(np.int64), empty.astype(np.uint16)
    return np.concatenate([c[0] for c in chunks]), np.concatenate([c[1] for c in chunks])


def pack_chunks(
    documents: Iterable[np.ndarray], sequence_length: int, eos: int, pad: int, rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`pack` as a stream of chunks of `rows` rows; only the last may have fewer.

    Holds one chunk and one document in memory.
    """
    room = rows * sequence_length
    tokens, segments = np.full(room, pad, np.int64), np.zeros(room, np.uint16)
    filled = segment = 0
    for document in documents:
        rest = np.append(np.asarray(document, np.int64), eos)
        while len(rest):
            if filled % sequence_length == 0:
                segment = 0
            segment += 1
            take = min(len(rest), sequence_length - filled % sequence_length)
            tokens[filled : filled + take] = rest[:take]
            segments[filled : filled + take] = segment
            filled, rest = filled + take, rest[take:]
            if filled == room:
                yield tokens.reshape(rows, -1), segments.reshape(rows, -1)
                tokens, segments = np.full(room, pad, np.int64), np.zeros(room, np.uint16)
                filled = 0
    if filled:
        used = -(-filled // sequence_length)
        yield tokens.reshape(rows, -1)[:used], segments.reshape(rows, -1)[:used]


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Groups of items whose lengths sum to at most `capacity`; no item is cut, each appears once.

    Best-fit decreasing: at most 11/9 of the optimal number of groups (Johnson 1974). Raises
    `ValueError` for an item longer than `capacity`.
    """
    groups: list[list[int]] = []
    open_groups: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room they have left
    rooms = 0  # bit r is set while some group has room r
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if length > capacity:
            raise ValueError(f"item {item} has length {length}, more than the capacity {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            group = open_groups[room].pop()
            if not open_groups[room]:
                rooms &= ~(1 << room)
        else:
            room, group = capacity, len(groups)
            groups.append([])
        groups[group].append(item)
        open_groups[room - length].append(group)
        rooms |= 1 << (room - length)
    return groups


def order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch reads the rows: a permutation, int64 [rows]."""
    return _permute(np.arange(rows, dtype=np.int64), rows, derive_seed(seed, "order", epoch))


def rows_for_step(rows: int, seed: int, step: int, batch_size: int) -> np.ndarray:
    """The rows of a step's batch, int64 [batch_size]; batches run on from epoch to epoch."""
    if rows < 1:
        raise ValueError("there are no rows to read")
    places = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epochs, places = np.divmod(places, rows)
    indices = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs).tolist():
        now = epochs == epoch
        indices[now] = _permute(places[now], rows, derive_seed(seed, "order", epoch))
    return indices


def _permute(places: np.ndarray, rows: int, key: int) -> np.ndarray:
    """Where a keyed permutation of 0..rows-1 sends `places`, without writing the permutation down.

    A Feistel network over the next power of four, walked until it lands inside (Black and Rogaway
    2002). Memory and time are those of a batch, however large the corpus.
    """
    half = max(1, ((rows - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (scramble(right, key + turn) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= np.uint64(rows)
    return values.astype(np.int64)


def scramble(values: np.ndarray, key: int) -> np.ndarray:
    """splitmix64 of each value (uint64) and a key: 64 new bits (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        z = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, T, T], True where row t may look at column s, for segments int [B, T].

    Causal, and within one document. Padding looks at itself only, so that no softmax is empty.
    """
    import torch  # preparing data does not pay for it

    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)
    real = (segments > 0)[:, None, :]
    return ((same & causal & real) | itself)[:, None]


def positions(segments: torch.Tensor) -> torch.Tensor:
    """int64 [B, T]: distance from the start of each segment, for segments int [B, T]."""
    import torch

    index = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
    starts = torch.zeros_like(index)
    starts[:, 1:] = torch.where(segments[:, 1:] != segments[:, :-1], index[:, 1:], 0)
    return index - starts.cummax(dim=1).values


def write_shard(
    directory: Path, name: str, tokens: np.ndarray, segments: np.ndarray, vocab_size: int
) -> dict[str, Any]:
    """Write tokens and segments [rows, T] as `NAME.tokens.npy` and `NAME.segments.npy`.

    Each file appears whole. Returns the shard's entry in the index.
    """
    files = {}
    for kind, array, dtype in (
        ("tokens", tokens, token_type(vocab_size)),
        ("segments", segments, np.uint16),
    ):
        file = directory / f"{name}.{kind}.npy"
        save_array(file, array.astype(dtype, copy=False))
        files[file.name] = {"size": file.stat().st_size, "sha256": hash_file(file)}
    real = int(np.count_nonzero(segments))
    return {"name": name, "rows": len(tokens), "tokens": real, "files": files}


def token_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The type that holds every token of a vocabulary."""
    return np.uint16 if vocab_size <= 65_535 else np.uint32


def save_array(file: Path, array: np.ndarray) -> None:
    """`np.save`, so that the file appears whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        np.save(stream, array)
    os.replace(temporary, file)


class ShardWriter:
    """Writes the chunks of one split as numbered shards, and keeps their entries."""

    def __init__(self, directory: Path, split: str, vocab_size: int) -> None:
        self._directory, self._split, self._vocab_size = directory, split, vocab_size
        self._shards: list[dict[str, Any]] = []
        self.rows = self.tokens = 0

    def write(self, tokens: np.ndarray, segments: np.ndarray) -> None:
        """Append a shard: tokens and segments [rows, T]."""
        name = f"{self._split}-{len(self._shards):05d}"
        self.adopt(write_shard(self._directory, name, tokens, segments, self._vocab_size))

    def adopt(self, shard: dict[str, Any]) -> None:
        """Append a shard that `write_shard` wrote, perhaps elsewhere."""
        self._shards.append(shard)
        self.rows, self.tokens = self.rows + shard["rows"], self.tokens + shard["tokens"]

    def describe(self) -> dict[str, Any]:
        """This split's entry in the index."""
        domains: dict[str, int] = {}
        for shard in self._shards:
            for name, tokens in shard.get("domains", {}).items():
                domains[name] = domains.get(name, 0) + tokens
        own = {"domains": dict(sorted(domains.items()))} if domains else {}
        return {"rows": self.rows, "tokens": self.tokens, **own, "shards": self._shards}


def write_index(
    directory: Path,
    sequence_length: int,
    vocab_size: int,
    tokenizer: str,
    splits: dict[str, ShardWriter],
) -> None:
    """Write `index.json`; `tokenizer` is its content hash."""
    write_json(
        directory / INDEX,
        {
            "sequence_length": sequence_length,
            "vocab_size": vocab_size,
            "splits": {name: writer.describe() for name, writer in splits.items()},
            "tokenizer": tokenizer,
        },
    )


def verify(directory: Path | str) -> list[str]:
    """Files of the shards in `directory` that are missing or not what the index says.

    Empty when all is well. Raises `UserError` when there is no index to go by.
    """
    directory = Path(directory)
    return [
        name
        for name, expected in list_hashes(directory).items()
        if not (directory / name).is_file() or hash_file(directory / name) != expected
    ]


def list_hashes(directory: Path) -> dict[str, str]:
    """sha256 of every file of the shards in `directory`, as the index has it."""
    return {
        name: described["sha256"]
        for split in _read_index(directory)["splits"].values()
        for shard in split["shards"]
        for name, described in shard["files"].items()
    }


def _read_index(directory: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        for split in index["splits"].values():
            for shard in split["shards"]:
                _ = shard["name"], shard["rows"], shard["files"]
    except FileNotFoundError:
        raise UserError(
            f"{directory} holds no {INDEX}; give a directory of packed shards"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory / INDEX} is damaged ({error}); prepare it again") from None
    return index


class PackedShards:
    """One split of packed rows, memory-mapped: opening looks at sizes, reading costs the rows."""

    def __init__(self, directory: Path | str, split: str = "train") -> None:
        """Raises `UserError` when `directory` holds no shards, lacks one, or one is cut off."""
        self._directory = Path(directory)
        index = _read_index(self._directory)
        if split not in index["splits"]:
            raise UserError(
                f"{self._directory / INDEX} is damaged (no split {split!r}); prepare it again"
            )
        described = index["splits"][split]
        self.sequence_length: int = index["sequence_length"]
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer: str = index["tokenizer"]
        self.rows: int = described["rows"]
        self.tokens: int = described["tokens"]
        self._names = [shard["name"] for shard in described["shards"]]
        counts = [shard["rows"] for shard in described["shards"]]
        self._starts = np.cumsum([0, *counts])
        for shard in described["shards"]:
            for name, expected in shard["files"].items():
                self._check_size(name, expected["size"])
        # Opened when first read, and not all at once: every mapping holds a file descriptor.
        self._open = functools.lru_cache(maxsize=OPEN_SHARDS)(self._map)

    def _check_size(self, name: str, expected: int) -> None:
        try:
            size = (self._directory / name).stat().st_size
        except OSError as error:
            self._refuse(name, error.strerror or str(error))
        if size != expected:
            self._refuse(name, f"{size:,} bytes of {expected:,}")

    def _refuse(self, name: str, reason: str) -> NoReturn:
        raise UserError(
            f"{self._directory / name} cannot be read ({reason}); prepare the shards again"
        ) from None

    def _map(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segments [rows, T] of a shard."""
        shape = (int(np.diff(self._starts)[shard]), self.sequence_length)
        arrays = []
        for kind in ("tokens", "segments"):
            name = f"{self._names[shard]}.{kind}.npy"
            try:
                array = np.load(self._directory / name, mmap_mode="r")
            except (OSError, ValueError) as error:
                self._refuse(name, str(error))
            if array.shape != shape:
                self._refuse(name, f"shape {array.shape} where the index has {shape}")
            arrays.append(array)
        return arrays[0], arrays[1]

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, segments), both int64 [n, T], of the given rows in the given order.

        Raises `IndexError` for a row that does not exist.
        """
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < self.rows):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} of {self.rows}")
        tokens = np.empty((len(wanted), self.sequence_length), np.int64)
        segments = np.empty_like(tokens)
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        for shard in np.unique(shards).tolist():
            here = shards == shard
            rows = wanted[here] - self._starts[shard]
            tokens[here], segments[here] = (array[rows] for array in self._open(shard))
        return tokens, segments
