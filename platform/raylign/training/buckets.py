"""Tensors packed into buckets of bounded bytes, each with a checksum over bytes and layout.

Packing takes one tensor at a time, because weights that are shared out over ranks exist whole only
while they are gathered. A tensor is copied in pieces that stay in the processor's cache, where they
are hashed at once: the checksum costs hardly more than the copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
import xxhash

ALIGNMENT = 64
"""Bytes, of each tensor in its bucket: any type can be viewed there, and tensors whose sizes are
multiples of it lie without gaps."""
_PIECE = 1 << 19
_WORDS = 1 << 22


class SyncError(RuntimeError):
    """A worker's weights are not what the learner published; it must not serve."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where a tensor lies inside its bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """Which bucket of which version; the checksum covers it, so that none can be left out, come
    twice, or stand in for another version's."""

    version: int
    index: int
    last: bool


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """One full bucket."""

    data: torch.Tensor
    """uint8 [bytes], in the memory that `room` gave."""
    checksum: str
    tensors: tuple[TensorSpec, ...]


class Handle(Protocol):
    """Where a transport has laid a bucket out."""

    def take(self, version: int, buckets: Sequence[Bucket], worker: str) -> Iterator[torch.Tensor]:
        """uint8 [bytes] of every bucket of a version in turn, in memory that stays as it is until
        the last has been taken. Asked of the first bucket's. Raises `SyncError`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """One bucket as it is published: where its bytes are, and what they must be."""

    handle: Handle
    checksum: str
    tensors: tuple[TensorSpec, ...]
    bytes: int


class _Checksum:
    """Over the bytes of tensors in order, then their layout. In the CPU's memory XXH3; on a card a
    sum that the card computes itself, so that bytes need not leave it."""

    def __init__(self, on_card: bool) -> None:
        self._hash = xxhash.xxh3_128()
        self._on_card = on_card

    def update(self, piece: torch.Tensor) -> None:
        if self._on_card:
            self._hash.update(_sum_words(piece).to_bytes(8, "little"))
        else:
            self._hash.update(_raw(piece).data)

    def finish(self, tensors: Iterable[TensorSpec], place: Place) -> str:
        for spec in tensors:
            self._hash.update(f"{spec.name}|{spec.dtype}|{spec.shape}|{spec.offset}\n".encode())
        self._hash.update(f"{place.version}|{place.index}|{place.last}".encode())
        return self._hash.hexdigest()


class _Open:
    """A bucket that is being filled."""

    def __init__(self, data: torch.Tensor) -> None:
        self._data = data
        self._checksum = _Checksum(data.is_cuda)
        self._tensors: list[TensorSpec] = []
        self.used = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        spec = TensorSpec(name, _dtype_name(tensor), tuple(tensor.shape), self.used, len(raw))
        self.used += len(raw) + -len(raw) % ALIGNMENT
        self._tensors.append(spec)
        target = self._data[spec.offset : spec.offset + spec.bytes]
        if raw.is_cuda or target.is_cuda:
            target.copy_(raw)
            self._checksum.update(target)
            return
        source, copy = _raw(raw), _raw(target)
        for start in range(0, len(source), _PIECE):
            piece = copy[start : start + _PIECE]
            piece[:] = source[start : start + _PIECE]
            self._checksum.update(target[start : start + _PIECE])

    def close(self, place: Place) -> Packed:
        tensors = tuple(self._tensors)
        checksum = self._checksum.finish(tensors, place)
        return Packed(self._data[: self.used], checksum, tensors)


def pack_buckets(
    version: int,
    tensors: Iterable[tuple[str, torch.Tensor]],
    limit: int,
    room: Callable[[int], torch.Tensor],
) -> Iterator[Packed]:
    """Concatenate tensors in their order into buckets of at most `limit` bytes; a larger tensor
    has one to itself.

    `room(bytes)` gives uint8 memory for the next bucket, of which only what is packed is written. A
    tensor is read before the next one is asked for, and need not outlive that.
    """
    bucket: _Open | None = None
    index = 0
    for name, tensor in tensors:
        size = tensor.nbytes + -tensor.nbytes % ALIGNMENT
        if bucket is not None and bucket.used + size > limit:
            yield bucket.close(Place(version, index, last=False))
            bucket, index = None, index + 1
        if bucket is None:
            bucket = _Open(room(max(limit, size)))
        bucket.add(name, tensor)
    if bucket is not None:
        yield bucket.close(Place(version, index, last=True))


def open_bucket(
    data: torch.Tensor, checksum: str, tensors: Iterable[TensorSpec], place: Place
) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a bucket as views of `data`, uint8 [bytes], once its checksum was proved to be
    of these bytes, this layout and this place.

    Raises `SyncError` that names the first tensor at fault: `data` too short for it, a type or
    shape that is not its bytes', or bytes or a layout that are not what was packed.
    """
    tensors = tuple(tensors)
    found, views = _Checksum(data.is_cuda), []
    for spec in tensors:
        end = spec.offset + spec.bytes
        if spec.offset < 0 or end > len(data):
            raise SyncError(
                f"{spec.name} is truncated: its bucket has {len(data)} bytes, not {end}"
            )
        raw, dtype = data[spec.offset : end], getattr(torch, spec.dtype, None)
        if not isinstance(dtype, torch.dtype) or prod(spec.shape) * dtype.itemsize != spec.bytes:
            raise SyncError(f"{spec.name}: {spec.bytes} bytes are no {spec.dtype} {spec.shape}")
        found.update(raw)
        views.append((spec.name, raw.view(dtype).view(spec.shape)))
    digest = found.finish(tensors, place)
    if digest != checksum:
        first = tensors[0].name if tensors else "nothing"
        raise SyncError(
            f"arrived damaged: checksum {digest} of the bucket that starts with {first}, "
            f"not {checksum}"
        )
    return views


def view_bytes(data: Any) -> torch.Tensor:
    """uint8 [n] of anything with a buffer, writable or not, without a copy."""
    with warnings.catch_warnings():
        # Memory of a store or of another process is read-only, and so is our use of it.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(np.frombuffer(data, np.uint8))


def _raw(data: torch.Tensor) -> np.ndarray:
    raw: np.ndarray = data.numpy()
    return raw


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _sum_words(data: torch.Tensor) -> int:
    """sum over i of (2 i + 1) (word i), modulo 2^64, of the 32-bit words of uint8 [n]; each weight
    is odd, so that every single changed word shows, and so do words that changed places."""
    padded = torch.nn.functional.pad(data, (0, -len(data) % 4)).view(torch.int32)
    total = 0
    for start in range(0, len(padded), _WORDS):
        words = padded[start : start + _WORDS].to(torch.int64)
        places = torch.arange(start, start + len(words), device=data.device) * 2 + 1
        total += int((words * places).sum())
    return total % 2**64
