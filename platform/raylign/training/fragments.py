"""Training state as pieces that any engine can read: which stretch of which parameter, and its
float32 master with Adam's moments.

A rank writes what it owns and gathers nothing. A reader asks for stretches of its own, so state
that was written with one number of ranks, ZeRO stage or cut of the matrices is read with another.
The files are safetensors: nothing in them is code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from raylign.config import UserError

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
_CHUNK = 2**24  # bytes written and hashed at once


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank holds of a parameter: all of it, or `start` to `stop` along `dim`."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    dim: int | None = None
    start: int = 0
    stop: int = 0

    @property
    def local(self) -> tuple[int, ...]:
        """Shape of what is held."""
        if self.dim is None:
            return self.shape
        size = self.stop - self.start
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """What is held, of the whole parameter; shares memory with it."""
        if self.dim is None:
            return whole
        return whole.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Shard:
    """A stretch of a parameter whose master this rank steps."""

    name: str
    place: Place
    start: int
    """First element, counted in what `place` holds, flattened."""
    numel: int
    flat: torch.Tensor
    """Float32, what the optimizer steps; its state has this tensor as key."""
    offset: int = 0
    """Of the stretch in `flat`, flattened."""

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The stretch of `flat`, or of a moment of the same shape: [numel], shared if possible."""
        return tensor.detach().reshape(-1).narrow(0, self.offset, self.numel)

    def fill(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Overwrite the stretch of `flat` or of a moment."""
        if tensor.is_contiguous():
            tensor.detach().view(-1).narrow(0, self.offset, self.numel).copy_(values)
        else:
            assert self.numel == tensor.numel(), f"{self.name} is cut and not contiguous"
            tensor.detach().copy_(values.view(tensor.shape))


@dataclass(frozen=True, slots=True)
class Fragment:
    """A stretch of a parameter with its values."""

    name: str
    place: Place
    start: int
    step: int
    """Updates taken, for Adam's bias correction."""
    tensors: Mapping[str, torch.Tensor]
    """[n] by kind: `MASTER`, and after the first update `MOMENTS`."""

    @property
    def numel(self) -> int:
        return self.tensors[MASTER].numel()

    def describe(self) -> dict[str, Any]:
        """Everything but the values, as JSON."""
        place = self.place
        return {
            "name": self.name,
            "shape": list(place.shape),
            "cut": None if place.dim is None else [place.dim, place.start, place.stop],
            "start": self.start,
            "numel": self.numel,
            "step": self.step,
        }


def list_whole(masters: Mapping[str, torch.Tensor]) -> list[Shard]:
    """Shards of parameters that a rank holds, and steps, whole."""
    return [Shard(name, Place(tuple(t.shape)), 0, t.numel(), t) for name, t in masters.items()]


def read_shards(
    shards: Iterable[Shard], state: Mapping[torch.Tensor, Mapping[str, Any]]
) -> list[Fragment]:
    """Masters and Adam's moments, which share memory with the optimizer; `state` is its own."""
    found = []
    for shard in shards:
        tensors, kept = {MASTER: shard.view(shard.flat)}, state.get(shard.flat) or {}
        for kind in MOMENTS:
            if kind in kept:
                tensors[kind] = shard.view(kept[kind])
        step = int(kept["step"]) if "step" in kept else 0
        found.append(Fragment(shard.name, shard.place, shard.start, step, tensors))
    return found


@torch.no_grad()
def fill_shards(
    shards: Iterable[Shard], optimizer: torch.optim.Optimizer, stored: StoredState
) -> None:
    """Put what was stored into masters and moments; the moments are made where there are none."""
    for shard in shards:
        flat, step = shard.flat, stored.step(shard.name)
        shard.fill(flat, stored.read(shard.name, MASTER, shard.place, shard.start, shard.numel))
        if step == 0:
            optimizer.state.pop(flat, None)
            continue
        state = optimizer.state[flat]
        on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        device = flat.device if on_device else torch.device("cpu")
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
        for kind in MOMENTS:
            if kind not in state:
                state[kind] = torch.zeros_like(flat)
            values = stored.read(shard.name, kind, shard.place, shard.start, shard.numel)
            shard.fill(state[kind], values)


@dataclass(slots=True)
class Shelf:
    """Memory that fragments are copied into, used again at every save."""

    buffers: dict[tuple[str, str, int], torch.Tensor] = field(default_factory=dict)

    def copy(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """The same values in memory of the CPU. Those of a GPU are on their way when this returns,
        in the order of its stream: synchronise before they are read."""
        kept = []
        for fragment in fragments:
            tensors = {}
            for kind, tensor in fragment.tensors.items():
                key = (fragment.name, kind, fragment.start)
                buffer = self.buffers.get(key)
                if buffer is None or buffer.shape != tensor.shape:
                    buffer = torch.empty(
                        tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
                    )
                    self.buffers[key] = buffer
                tensors[kind] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
            kept.append(
                Fragment(fragment.name, fragment.place, fragment.start, fragment.step, tensors)
            )
        return kept


def write_part(fragments: Sequence[Fragment], file: Path) -> dict[str, Any]:
    """Write a safetensors file to disk, hashed on the way; its `size` and `sha256`.

    Raises `OSError` when the disk is full or fails.
    """
    header: dict[str, Any] = {
        "__metadata__": {"fragments": json.dumps([f.describe() for f in fragments])}
    }
    position = 0
    tensors = []
    for index, fragment in enumerate(fragments):
        for kind, tensor in fragment.tensors.items():
            assert tensor.dtype == torch.float32, f"{fragment.name} is stored as {tensor.dtype}"
            end = position + tensor.numel() * 4
            header[f"{index}.{kind}"] = {
                "dtype": "F32",
                "shape": [tensor.numel()],
                "data_offsets": [position, end],
            }
            position = end
            tensors.append(tensor)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with file.open("wb", buffering=0) as stream:
        for piece in _list_pieces(len(text).to_bytes(8, "little") + text, tensors):
            digest.update(piece)
            size += len(piece)
            while piece:  # unbuffered, a write may be short
                piece = piece[stream.write(piece) :]
        os.fsync(stream.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _list_pieces(head: bytes, tensors: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(head)
    for tensor in tensors:
        values: Any = tensor.detach().cpu().contiguous().numpy()
        whole = memoryview(values).cast("B")
        for start in range(0, len(whole), _CHUNK):
            yield whole[start : start + _CHUNK]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A fragment in a file."""

    file: Path
    index: int
    place: Place
    start: int
    numel: int
    step: int


class StoredState:
    """Fragments in files, read by name and stretch; opening reads their headers only."""

    def __init__(self, directory: Path) -> None:
        """Raises `UserError` when `directory` holds no state."""
        self._directory = directory
        self._pieces: dict[str, list[_Piece]] = {}
        self._open: dict[Path, Any] = {}
        for file in sorted(directory.glob("*.safetensors")):
            self._open[file] = safe_open(file, framework="pt")
            metadata = self._open[file].metadata() or {}
            for index, row in enumerate(json.loads(metadata.get("fragments", "[]"))):
                cut = row["cut"] or (None, 0, 0)
                place = Place(tuple(row["shape"]), *cut)
                piece = _Piece(file, index, place, row["start"], row["numel"], row["step"])
                self._add(row["name"], piece)
        if not self._pieces:
            raise UserError(f"{directory} holds no training state")

    def _add(self, name: str, piece: _Piece) -> None:
        """Replicas may have written the same stretch: one is enough."""
        held = self._pieces.setdefault(name, [])
        if not any(
            (p.place, p.start, p.numel) == (piece.place, piece.start, piece.numel) for p in held
        ):
            held.append(piece)

    @property
    def names(self) -> list[str]:
        """Parameters, in alphabetical order."""
        return sorted(self._pieces)

    def step(self, name: str) -> int:
        """Updates that a parameter has taken."""
        return self._find(name)[0].step

    def read(self, name: str, kind: str, place: Place, start: int, numel: int) -> torch.Tensor:
        """Float32 [numel]: a stretch of what `place` holds of a parameter, flattened.

        Raises `UserError` when the parameter is missing, of another shape, or not complete.
        """
        pieces = self._find(name)
        if pieces[0].place.shape != place.shape:
            raise UserError(
                f"{self._directory} holds {name} as {list(pieces[0].place.shape)}, and the model "
                f"as {list(place.shape)}: it is of another model"
            )
        if place.dim is not None or any(piece.place.dim is not None for piece in pieces):
            held = place.cut(self.whole(name, kind)).reshape(-1)
            return held.narrow(0, start, numel)
        wanted, found = torch.empty(numel), 0
        for piece in pieces:
            first = max(start, piece.start)
            last = min(start + numel, piece.start + piece.numel)
            if first < last:
                stretch = slice(first - piece.start, last - piece.start)
                wanted[first - start : last - start] = self._load(piece, kind, stretch)
                found += last - first
        self._require(found == numel, name)
        return wanted

    def whole(self, name: str, kind: str = MASTER) -> torch.Tensor:
        """Float32, a parameter or its moment in its own shape."""
        pieces = self._find(name)
        whole = torch.empty(pieces[0].place.shape)
        parts: dict[Place, torch.Tensor] = {}
        found = 0
        for piece in pieces:
            local = parts.setdefault(piece.place, torch.empty(math.prod(piece.place.local)))
            end = piece.start + piece.numel
            local[piece.start : end] = self._load(piece, kind, slice(0, piece.numel))
            found += piece.numel
        for place, local in parts.items():
            place.cut(whole).copy_(local.view(place.local))
        self._require(found == whole.numel(), name)
        return whole

    def _find(self, name: str) -> list[_Piece]:
        if name not in self._pieces:
            raise UserError(f"{self._directory} does not hold {name}: it is of another model")
        return self._pieces[name]

    def _load(self, piece: _Piece, kind: str, stretch: slice) -> torch.Tensor:
        values: torch.Tensor = self._open[piece.file].get_slice(f"{piece.index}.{kind}")[stretch]
        return values

    def _require(self, whole: bool, name: str) -> None:
        if not whole:
            raise UserError(
                f"{self._directory} holds only a part of {name}; use another checkpoint"
            )
