"""Judged answers on disk, and the micro-batches that their objectives compute.

A row is a prompt with one or two answers after it. A micro-batch of pairs holds each prompt once,
with both answers behind it that do not see each other, where that saves enough; else each answer
has a row of its own. Both give the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from raylign.data.comparisons import Answer, Compared
from raylign.data.comparisons.encoding import WRONG

# A prompt is shared when that leaves less than this of the tokens to compute: its mask costs, too.
SHARED_BELOW = 0.75

_ARRAYS = ("tokens", "marks", "starts", "ends", "values")

Scoring = Literal["tokens", "ends", "marks"]
"""What of an answer is read: the log-probs of its marked tokens; a score at its end; scores at its
marks."""


@dataclass(frozen=True, slots=True, eq=False)
class ComparedRows:
    """Rows as they are read: n prompts, each with A answers behind it, padded on the right."""

    tokens: np.ndarray
    """int64 [n, W]"""
    marks: np.ndarray
    """uint8 [n, W]: as in `Answer`; 0 on prompts and padding."""
    ends: np.ndarray
    """int64 [n, 1 + A]: where the prompt and each answer end."""
    values: np.ndarray
    """float32 [n]: margins of pairs, labels of answers."""
    reference: np.ndarray
    """float32 [n, A]: log-probs of the answers' marked tokens under the reference policy; zeros
    where there is none."""

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding, a prompt counted once."""
        return int(self.ends[:, -1].sum())

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n, A]: marked tokens of each answer."""
        summed = np.cumsum(self.marks > 0, axis=1)
        at_ends = np.take_along_axis(summed, self.ends - 1, axis=1)
        return np.diff(at_ends, axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class ComparisonBatch:
    """Rows that a rank computes at once: B prompts with A answers each."""

    tokens: torch.Tensor
    """int64 [S, T]"""
    attention_mask: torch.Tensor | None
    """bool [S, 1, T, T] where answers share a row, else None."""
    position_ids: torch.Tensor | None
    """int64 [S, T] where answers share a row, else None."""
    places: torch.Tensor
    """int64 [M]: hidden states that are read, as indices into S x T; answer by answer."""
    targets: torch.Tensor
    """int64 [M]: the token after each."""
    right: torch.Tensor
    """bool [M]: whether a step that ends there is right."""
    lengths: torch.Tensor
    """int64 [B, A]: how many of M belong to each answer."""
    values: torch.Tensor
    """float32 [B]"""
    reference: torch.Tensor
    """float32 [B, A]"""

    def to(self, device: torch.device) -> ComparisonBatch:
        """The same rows on `device`."""
        given = {name: getattr(self, name) for name in self.__dataclass_fields__}
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device) for name, tensor in given.items()
        }
        return ComparisonBatch(**moved)


class ComparedFile:
    """Rows that `write_compared` wrote."""

    def __init__(self, directory: Path, split: str, reference: Path | None = None) -> None:
        """`reference`: float32 [count, A] of log-probs, read when the first rows are."""
        arrays = [np.load(directory / f"{split}.{name}.npy", mmap_mode="r") for name in _ARRAYS]
        self._tokens, self._marks, self._starts, self._ends, self._values = arrays
        self._file, self._reference = reference, None if reference is None else np.empty((0, 0))
        self.count = len(self._values)
        self._sources = directory / f"{split}.sources.npy"

    def trace(self, index: int) -> list[int]:
        """The row of the file of judged answers; of kto without that of the stranger behind it."""
        row = int(np.load(self._sources, mmap_mode="r")[index])
        return [row] if row else []

    @property
    def answers(self) -> int:
        """Answers a row."""
        return int(self._ends.shape[1]) - 1

    @property
    def sizes(self) -> np.ndarray:
        """int64 [count]: tokens of each row."""
        return np.asarray(self._ends[:, -1])

    def read(self, indices: Sequence[int] | np.ndarray) -> ComparedRows:
        rows = np.asarray(indices, dtype=np.int64)  # of no rows it would be an array of floats
        ends = self._ends[rows]
        width = int(ends[:, -1].max()) if len(rows) else 1
        tokens = np.zeros((len(rows), width), np.int64)
        marks = np.zeros((len(rows), width), np.uint8)
        for place, row in enumerate(rows.tolist()):
            start, end = self._starts[row], self._starts[row + 1]
            tokens[place, : end - start] = self._tokens[start:end]
            marks[place, : end - start] = self._marks[start:end]
        return ComparedRows(tokens, marks, ends, self._values[rows], self._refer(rows))

    def _refer(self, rows: np.ndarray) -> np.ndarray:
        if self._file is None or not self._file.exists():
            return np.zeros((len(rows), self.answers), np.float32)
        if self._reference is None or not self._reference.size:
            self._reference = np.load(self._file, mmap_mode="r")
        return self._reference[rows]


def write_compared(items: Sequence[Compared], directory: Path, split: str) -> str:
    """Write rows with equally many answers; a hash of all that scores of them depend on."""
    directory.mkdir(parents=True, exist_ok=True)
    pieces = [(item.prompt, *(a.token_ids for a in item.answers)) for item in items]
    unscored = [np.zeros(len(item.prompt), np.uint8) for item in items]
    marks = [
        (none, *(a.marks for a in item.answers)) for none, item in zip(unscored, items, strict=True)
    ]
    ends = np.array([np.cumsum([len(p) for p in row]) for row in pieces], np.int64)
    arrays = {
        "tokens": np.concatenate([p for row in pieces for p in row]).astype(np.int32),
        "marks": np.concatenate([m for row in marks for m in row]),
        "starts": np.concatenate([[0], np.cumsum(ends[:, -1])]).astype(np.int64),
        "ends": ends,
        "values": np.array([item.value for item in items], np.float32),
    }
    digest = hashlib.sha256()
    for name in _ARRAYS:
        np.save(directory / f"{split}.{name}.npy", arrays[name])
        if name != "values":
            digest.update(arrays[name].tobytes())
    np.save(directory / f"{split}.sources.npy", np.array([item.row for item in items], np.int64))
    return digest.hexdigest()


def add_strangers(items: Sequence[Compared], max_length: int) -> list[Compared]:
    """Labelled answers, each with the answer to another prompt behind it, half the file away: what
    KTO estimates its reference point from. Cut to `max_length` tokens with the prompt."""
    shift = max(1, len(items) // 2)
    paired = []
    for place, item in enumerate(items):
        stranger = items[(place + shift) % len(items)].answers[0]
        room = max(1, max_length - len(item.prompt))
        cut = Answer(stranger.token_ids[:room], stranger.marks[:room])
        paired.append(replace(item, answers=(item.answers[0], cut)))
    return paired


def pick_answer(rows: ComparedRows, part: slice, answer: int) -> ComparedRows:
    """Rows of `part` with one of their answers each, right behind the prompt."""
    ends, tokens, marks = rows.ends[part], rows.tokens[part], rows.marks[part]
    prompt, begun = ends[:, 0], ends[:, answer]
    end = prompt + ends[:, answer + 1] - begun
    columns = np.arange(max(1, int(end.max(initial=0))))
    source = columns + np.where(columns < prompt[:, None], 0, (begun - prompt)[:, None])
    source = np.minimum(source, tokens.shape[1] - 1)
    inside = columns < end[:, None]
    return ComparedRows(
        np.where(inside, np.take_along_axis(tokens, source, axis=1), 0),
        np.where(inside, np.take_along_axis(marks, source, axis=1), 0).astype(np.uint8),
        np.stack([prompt, end], axis=1),
        rows.values[part],
        rows.reference[part][:, answer : answer + 1],
    )


def assemble_compared(
    rows: ComparedRows, part: slice, scoring: Scoring, *, pad: int, share: bool
) -> ComparisonBatch:
    """A micro-batch of some of `rows`; of none, one that reads nothing.

    pad: token that `ends` looks over, as transformers does. share: whether prompts may be shared.
    """
    ends, tokens = rows.ends[part], rows.tokens[part]
    answers = ends.shape[1] - 1
    if not len(ends):
        return _assemble_nothing(answers)
    prompt, sizes = ends[:, 0], np.diff(ends, axis=1)
    apart = len(ends) * answers * int((prompt[:, None] + sizes).max())
    shared = share and answers > 1 and len(ends) * int(ends[:, -1].max()) < SHARED_BELOW * apart
    layout = _lay_together(tokens, ends) if shared else _lay_apart(tokens, ends)
    lengths, columns, before = _find_places(rows, part, scoring, pad)
    # Where column c of row r lies: with its answer, in the layout's own coordinates.
    owner = np.repeat(np.arange(lengths.size), lengths.reshape(-1))
    row, answer = owner // answers, owner % answers
    shift = 0 if shared else ends[row, answer] - prompt[row]
    sequence = row if shared else owner
    width = layout.tokens.shape[1]
    state = np.where(before < prompt[row], before, before - shift)
    chosen = tokens[row, np.minimum(columns, tokens.shape[1] - 1)]
    return ComparisonBatch(
        torch.from_numpy(layout.tokens),
        layout.mask,
        layout.positions,
        torch.from_numpy(sequence * width + state),
        torch.from_numpy(chosen),
        torch.from_numpy(rows.marks[part][row, np.minimum(columns, tokens.shape[1] - 1)] != WRONG),
        torch.from_numpy(lengths),
        torch.from_numpy(rows.values[part]),
        torch.from_numpy(np.ascontiguousarray(rows.reference[part])),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    tokens: np.ndarray
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None


def _lay_together(tokens: np.ndarray, ends: np.ndarray) -> _Layout:
    """A row as it is read: prompt, and answers that see the prompt and themselves."""
    width = int(ends[:, -1].max())
    columns = np.arange(width)
    # 0 is the prompt; beyond the last answer is padding, which nobody looks at.
    owner = torch.from_numpy((columns[None, :, None] >= ends[:, None, :]).sum(-1))
    visible = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
    causal = torch.ones((width, width), dtype=torch.bool).tril()
    starts = np.concatenate([np.zeros_like(ends[:, :1]), ends], axis=1)
    begun = np.take_along_axis(starts, owner.numpy(), axis=1)
    places = columns - begun + np.where(owner.numpy() > 0, ends[:, :1], 0)
    places[columns[None] >= ends[:, -1:]] = 0  # some models look positions up in a table
    mask = (visible & causal)[:, None]
    return _Layout(np.ascontiguousarray(tokens[:, :width]), mask, torch.from_numpy(places))


def _lay_apart(tokens: np.ndarray, ends: np.ndarray) -> _Layout:
    """A row for each answer, behind its prompt: causal attention needs no mask."""
    prompt, sizes = ends[:, 0], np.diff(ends, axis=1)
    width = max(2, int((prompt[:, None] + sizes).max()))
    laid = np.zeros((sizes.size, width), np.int64)
    for row in range(len(ends)):
        for answer in range(sizes.shape[1]):
            target = laid[row * sizes.shape[1] + answer]
            size = sizes[row, answer]
            target[: prompt[row]] = tokens[row, : prompt[row]]
            begun = ends[row, answer]
            target[prompt[row] : prompt[row] + size] = tokens[row, begun : begun + size]
    return _Layout(laid)


def _find_places(
    rows: ComparedRows, part: slice, scoring: Scoring, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many columns of each answer [B, A] are read; which [M]; and those of the states [M]."""
    ends, marks, tokens = rows.ends[part], rows.marks[part], rows.tokens[part]
    found: list[np.ndarray] = []
    before: list[np.ndarray] = []
    for row in range(len(ends)):
        for start, end in zip(ends[row, :-1], ends[row, 1:], strict=True):
            if scoring == "ends":
                real = np.flatnonzero(tokens[row, start:end] != pad)
                columns = np.array([start + (real[-1] if len(real) else 0)])
            else:
                columns = start + np.flatnonzero(marks[row, start:end])
            # The first token of any answer follows the prompt's last one.
            states = np.where(columns == start, ends[row, 0], columns) - 1
            found.append(columns)
            before.append(states if scoring == "tokens" else columns)
    lengths = np.array([len(columns) for columns in found], np.int64)
    shape = (len(ends), ends.shape[1] - 1)
    return lengths.reshape(shape), np.concatenate(found), np.concatenate(before)


def _assemble_nothing(answers: int) -> ComparisonBatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return ComparisonBatch(
        torch.zeros((1, 2), dtype=torch.int64),
        None,
        None,
        nothing,
        nothing,
        nothing.bool(),
        torch.zeros((0, answers), dtype=torch.int64),
        torch.zeros(0),
        torch.zeros((0, answers)),
    )
