"""Packed rows as supervised training reads them, and how a step's rows are dealt to ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeVar

import numpy as np
import torch

from raylign.data.chat import Conversation
from raylign.data.packing import PackedShards, attention_mask, pack_best_fit, positions
from raylign.training.noise import EmbeddingNoise


class Inputs(Protocol):
    """What every micro-batch has, whatever is learned from it."""

    @property
    def tokens(self) -> torch.Tensor:
        """int64 [B, T]"""
        ...

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """bool [B, 1, T, T], True where a query (third axis) may attend to a key; None for plain
        causal attention."""
        ...

    @property
    def position_ids(self) -> torch.Tensor | None:
        """int64 [B, T], or None for 0..T-1."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same rows on `device`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Rows of text that a rank computes at once."""

    tokens: torch.Tensor
    """int64 [B, T]"""
    trained: torch.Tensor
    """bool [B, T]: True where token t is a target."""
    attention_mask: torch.Tensor | None
    """bool [B, 1, T, T], or None for plain causal attention."""
    position_ids: torch.Tensor | None
    """int64 [B, T], or None for 0..T-1."""
    noise: EmbeddingNoise | None = None
    """What training adds to the embeddings."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same rows on `device`."""
        mask, places, noise = self.attention_mask, self.position_ids, self.noise
        return MicroBatch(
            self.tokens.to(device),
            self.trained.to(device),
            None if mask is None else mask.to(device),
            None if places is None else places.to(device),
            None if noise is None else noise.to(device),
        )


@dataclass(frozen=True, slots=True, eq=False)
class TextRows:
    """Rows as they are read, before they are cut into micro-batches."""

    tokens: np.ndarray
    """int64 [n, T]"""
    segments: np.ndarray
    """int64 [n, T]: the document of each token, counted from 1; 0 is padding."""
    trained: np.ndarray
    """bool [n, T]: True where token t is a target."""

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segments > 0).sum())


class Whole(Protocol):
    """All rows of a step, as arrays whose first axis is the row."""

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        ...


W = TypeVar("W", covariant=True)


class Rows(Protocol[W]):
    """Rows on disk: opening costs nothing, reading costs the rows."""

    count: int
    """Rows there are."""

    def read(self, indices: Sequence[int] | np.ndarray) -> W:
        """The given rows, in the given order."""
        ...

    def trace(self, index: int) -> list[int]:
        """Rows of the user's file, from 1, that a row was made of; empty where it is not known."""
        ...


class CorpusRows:
    """Rows of packed shards; every real token that something may predict is trained."""

    def __init__(
        self, directory: Path, split: str, isolate: bool, length: int | None = None
    ) -> None:
        """With `isolate` nothing predicts the first token of a document. `length` cuts the shards'
        rows into shorter ones; it must divide theirs. Raises `UserError` when the shards are
        missing or damaged."""
        self._shards, self._isolate = PackedShards(directory, split), isolate
        self._length = length or self._shards.sequence_length
        self._pieces = self._shards.sequence_length // self._length
        self.count = self._shards.rows * self._pieces

    def read(self, indices: Sequence[int] | np.ndarray) -> TextRows:
        wanted = np.asarray(indices, np.int64)
        tokens, segments = self._shards.read(wanted // self._pieces)
        if self._pieces > 1:
            places = (np.arange(len(wanted)), wanted % self._pieces)
            shape = (len(wanted), self._pieces, self._length)
            tokens, segments = tokens.reshape(shape)[places], segments.reshape(shape)[places]
            # A piece counts its documents from 1, too.
            segments = np.where(segments > 0, segments - segments[:, :1] + 1, 0)
        trained = segments > 0
        trained[:, 0] = False
        if self._isolate:
            trained[:, 1:] &= segments[:, 1:] == segments[:, :-1]
        return TextRows(tokens, segments, trained)

    def trace(self, index: int) -> list[int]:
        """Not known: shards hold text of many files."""
        return []


class DemonstrationRows:
    """Rows that `write_demonstrations` wrote."""

    def __init__(self, directory: Path, split: str) -> None:
        self._columns = [
            np.load(directory / f"{split}.{name}.npy", mmap_mode="r")
            for name in ("tokens", "segments", "trained")
        ]
        self.count = len(self._columns[0])
        self._sources = directory / f"{split}.sources.npy"

    def trace(self, index: int) -> list[int]:
        """Rows of the file of demonstrations."""
        found = np.load(self._sources, mmap_mode="r")[index]
        return [int(row) for row in dict.fromkeys(found.tolist()) if row]

    def read(self, indices: Sequence[int] | np.ndarray) -> TextRows:
        rows = np.asarray(indices, dtype=np.int64)  # of no rows it would be an array of floats
        tokens, segments, trained = (column[rows] for column in self._columns)
        return TextRows(tokens.astype(np.int64), segments.astype(np.int64), trained)


def write_demonstrations(
    conversations: Sequence[Conversation],
    length: int,
    pad: int,
    directory: Path,
    split: str,
    packing: bool = True,
) -> int:
    """Fit conversations into rows of `length` tokens, best fit, none cut; the number of rows.

    Without `packing` each has a row of its own.
    """
    groups = [[item] for item in range(len(conversations))]
    if packing:
        groups = pack_best_fit([len(c.token_ids) for c in conversations], length)
    tokens = np.full((len(groups), length), pad, np.int32)
    segments = np.zeros((len(groups), length), np.uint16)
    trained = np.zeros((len(groups), length), bool)
    sources = np.zeros((len(groups), max(map(len, groups), default=0)), np.int64)
    for row, group in enumerate(groups):
        sources[row, : len(group)] = [conversations[item].row for item in group]
        start = 0
        for segment, item in enumerate(group, 1):
            end = start + len(conversations[item].token_ids)
            tokens[row, start:end] = conversations[item].token_ids
            trained[row, start:end] = conversations[item].trained
            segments[row, start:end] = segment
            start = end
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / f"{split}.tokens.npy", tokens)
    np.save(directory / f"{split}.segments.npy", segments)
    np.save(directory / f"{split}.trained.npy", trained)
    np.save(directory / f"{split}.sources.npy", sources)
    return len(groups)


def assemble(rows: TextRows, part: slice, isolate: bool) -> MicroBatch:
    """A micro-batch of some of `rows`, as wide as the longest of them.

    No rows give one that trains nothing, so that every rank has something to compute.
    """
    segments = rows.segments[part]
    if not len(segments):
        nothing = torch.zeros((1, 2), dtype=torch.int64)
        return MicroBatch(nothing, nothing.bool(), None, None)
    width = max(2, int(np.flatnonzero(segments.any(axis=0))[-1]) + 1) if segments.any() else 2
    segments = segments[:, :width]
    mask = places = None
    # Rows of one document and padding on their right need no mask: causal attention isolates them.
    if isolate and (segments > 1).any():
        documents = torch.from_numpy(segments)
        mask, places = attention_mask(documents), positions(documents)
    return MicroBatch(
        torch.from_numpy(rows.tokens[part, :width]),
        torch.from_numpy(rows.trained[part, :width]),
        mask,
        places,
    )


def deal(rows: int, rank: int, ranks: int, micro_batch: int) -> list[slice]:
    """Which of a step's `rows` this rank computes, as micro-batches of at most `micro_batch`.

    All ranks get equally many, as collectives need; with few rows some are empty. Together the
    slices of all ranks cover every row once.
    """
    bounds = [rows * place // ranks for place in range(ranks + 1)]
    largest = max(bounds[place + 1] - bounds[place] for place in range(ranks))
    pieces = max(1, -(-largest // micro_batch))
    start, size = bounds[rank], bounds[rank + 1] - bounds[rank]
    cuts = [start + size * place // pieces for place in range(pieces + 1)]
    return [slice(cuts[place], cuts[place + 1]) for place in range(pieces)]


def interleave(rows: int, rank: int, ranks: int, micro_batch: int) -> list[slice]:
    """The same of rows that are sorted by length, of which neighbours go to different ranks: what
    all ranks compute at the same time is about equally long."""
    size = len(range(rank, rows, ranks))
    largest = -(-rows // ranks)
    pieces = max(1, -(-largest // micro_batch))
    cuts = [rank + ranks * (size * place // pieces) for place in range(pieces + 1)]
    return [slice(cuts[place], cuts[place + 1], ranks) for place in range(pieces)]
