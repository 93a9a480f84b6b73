"""The ways that buckets of weights go from the learner to a worker, behind one protocol.

The learner asks for room, fills it, lays the bucket out, and has its handle; whoever holds the
handle reads the bucket. Here: Ray's object store, which reaches everywhere; memory shared on one
machine; and memory of a card that learner and worker share. `actors.broadcast` has the process
group.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import psutil
import ray
import torch

from raylign.config import UserError
from raylign.training.buckets import Bucket, Packed, SyncError, view_bytes

_PAGE = mmap.ALLOCATIONGRANULARITY
_STAMP = 8  # bytes of the version at the start of an arena


class Transport(Protocol):
    """The learner's side. `begin`, then `room` and `lay` for each bucket, then `finish`."""

    name: str

    def begin(self, version: int) -> None:
        """What was laid out two versions ago may be overwritten from here on."""
        ...

    def room(self, size: int) -> torch.Tensor:
        """uint8 [size] to pack the next bucket in. Raises `UserError` when there is none."""
        ...

    def lay(self, packed: Packed) -> None:
        """Make a packed bucket available; `room` may be asked for again at once."""
        ...

    def finish(self) -> tuple[Bucket, ...]:
        """The buckets since `begin`, all available."""
        ...

    def close(self) -> None:
        """Give back all memory."""
        ...


def choose_transport(
    wanted: str,
    *,
    learner_on_card: bool,
    workers_on_cards: bool,
    same_card: bool,
    one_machine: bool,
) -> str:
    """The transport's name, for a configured one that may be `auto`.

    Raises `UserError` when the wanted one cannot work where learner and workers are.
    """
    cards = learner_on_card and workers_on_cards
    if wanted == "auto":
        if cards and same_card:
            return "ipc"
        if cards:
            return "broadcast"
        return "shared_memory" if one_machine else "object_store"
    if wanted == "ipc" and not (cards and same_card):
        raise UserError(
            "transfer.transport=ipc needs learner and workers on the same card; use auto"
        )
    if wanted == "shared_memory" and not one_machine:
        raise UserError(
            "transfer.transport=shared_memory needs learner and workers on one machine; use auto"
        )
    return wanted


@dataclass(frozen=True, slots=True)
class Stored:
    """A bucket in Ray's object store."""

    ref: ray.ObjectRef

    def take(self, version: int, buckets: Sequence[Bucket], worker: str) -> Iterator[torch.Tensor]:
        """In the store's own memory where the store is on this machine."""
        del version, worker  # an object never changes
        for bucket in buckets:
            yield view_bytes(ray.get(bucket.handle.ref))  # type: ignore[attr-defined]


class ObjectStore:
    """Ray's object store: reaches every machine, and keeps a version for as long as its manifest
    is held. A bucket is copied into the store while the next one is packed."""

    name = "object_store"

    def __init__(self) -> None:
        self._spare: list[torch.Tensor] = []
        self._laid: list[tuple[Packed, torch.Tensor, Future[Any]]] = []
        self._filling: torch.Tensor | None = None
        self._store = ThreadPoolExecutor(1, "weights")

    def begin(self, version: int) -> None:
        del version
        self._laid.clear()

    def room(self, size: int) -> torch.Tensor:
        if len(self._laid) > 1:  # two are enough: one is packed while the other is stored
            _, buffer, stored = self._laid[-2]
            stored.result()
            self._spare.append(buffer)
        fitting = [b for b in self._spare if len(b) >= size]
        self._filling = fitting[0] if fitting else torch.empty(size, dtype=torch.uint8)
        self._spare.clear()
        return self._filling

    def lay(self, packed: Packed) -> None:
        assert self._filling is not None, "room() comes before lay()"
        future = self._store.submit(ray.put, packed.data.numpy())
        self._laid.append((packed, self._filling, future))

    def finish(self) -> tuple[Bucket, ...]:
        buckets = tuple(
            Bucket(Stored(stored.result()), packed.checksum, packed.tensors, len(packed.data))
            for packed, _, stored in self._laid
        )
        self._spare = [buffer for _, buffer, _ in self._laid[-2:]]
        self._laid.clear()
        return buckets

    def close(self) -> None:
        self._store.shutdown(wait=False)
        self._spare.clear()
        self._laid.clear()


@dataclass(frozen=True, slots=True)
class Mapped:
    """A bucket in memory that the learner shares with processes of its machine."""

    pid: int
    descriptor: int
    inode: int
    offset: int
    size: int

    def take(self, version: int, buckets: Sequence[Bucket], worker: str) -> Iterator[torch.Tensor]:
        """The very pages that the learner wrote. Raises `SyncError` also where it has begun to
        overwrite them."""
        del worker
        pages = _open_arena(self.pid, self.descriptor, self.inode)
        for bucket in buckets:
            pages.require(version)
            yield pages.segment(bucket.handle.offset, bucket.handle.size)  # type: ignore[attr-defined]
        pages.require(version)


class _Pages:
    """Memory-mapped pieces of one file, each mapped once; the file starts with a version."""

    def __init__(self, descriptor: int, access: int) -> None:
        self.descriptor, self._access = descriptor, access
        self._segments: dict[tuple[int, int], torch.Tensor] = {}
        self._stamp = mmap.mmap(descriptor, _PAGE, mmap.MAP_SHARED, access)

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            os.close(self.descriptor)

    @property
    def version(self) -> int:
        return int.from_bytes(self._stamp[:_STAMP], "little", signed=True)

    @version.setter
    def version(self, value: int) -> None:
        self._stamp[:_STAMP] = value.to_bytes(_STAMP, "little", signed=True)

    def require(self, version: int) -> None:
        """Raises `SyncError` when the file holds another version, or is being written."""
        if self.version != version:
            what = f"version {self.version}" if self.version >= 0 else "a later version"
            raise SyncError(f"its memory holds {what} now; take the current manifest")

    def segment(self, offset: int, size: int) -> torch.Tensor:
        """uint8 [size] from `offset`, a whole number of pages."""
        if (offset, size) not in self._segments:
            flags = mmap.MAP_SHARED
            if self._access == mmap.PROT_READ:
                flags |= mmap.MAP_POPULATE  # all pages at once, not one fault each
            mapped = mmap.mmap(self.descriptor, size, flags, self._access, offset=offset)
            self._segments[offset, size] = view_bytes(mapped)
        return self._segments[offset, size]


@lru_cache(maxsize=2)  # the learner has two, and a restarted one has others
def _open_arena(pid: int, descriptor: int, inode: int) -> _Pages:
    gone = SyncError(
        f"the learner (process {pid}) that shared it is gone, or is not on this machine"
    )
    try:
        own = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise gone from error
    if os.fstat(own).st_ino != inode:
        os.close(own)
        raise gone
    return _Pages(own, mmap.PROT_READ)


class _Arena:
    """A file in memory that has no name: the kernel frees it with the last process that has it
    open, however that ends. Its pages are kept from version to version, because memory that is
    touched for the first time costs ten times a copy."""

    def __init__(self) -> None:
        descriptor = os.memfd_create("raylign-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, _PAGE)
        # A reader of pages that were cut off would be killed.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self._inode = os.fstat(descriptor).st_ino
        self._pages = _Pages(descriptor, mmap.PROT_READ | mmap.PROT_WRITE)
        self._size = self._end = _PAGE

    def clear(self) -> None:
        self._pages.version = -1
        self._end = _PAGE

    def room(self, size: int) -> torch.Tensor:
        size += -size % _PAGE
        if self._end + size > self._size:
            _require_memory(self._end + size - self._size)
            self._size = self._end + size
            os.ftruncate(self._pages.descriptor, self._size)
        return self._pages.segment(self._end, size)

    def keep(self, size: int) -> Mapped:
        """The first `size` bytes of the last room stay; the next begins behind them."""
        mapped = Mapped(os.getpid(), self._pages.descriptor, self._inode, self._end, size)
        self._end += size + -size % _PAGE
        return mapped

    def stamp(self, version: int) -> None:
        self._pages.version = version


class SharedMemory:
    """Memory shared by the processes of one machine. The learner writes weights once, workers map
    the same pages. There are two arenas, so that a newcomer can read a version while the next one
    is written; one that is still reading when the next but one begins is told so."""

    name = "shared_memory"

    def __init__(self) -> None:
        self._arenas: list[_Arena] = []
        self._version = -1
        self._laid: list[Bucket] = []

    def begin(self, version: int) -> None:
        if len(self._arenas) < 2:
            self._arenas.append(_Arena())
        else:
            self._arenas.reverse()
        self._version = version
        self._laid = []
        self._arenas[-1].clear()

    def room(self, size: int) -> torch.Tensor:
        return self._arenas[-1].room(size)

    def lay(self, packed: Packed) -> None:
        size = len(packed.data)
        handle = self._arenas[-1].keep(size)
        self._laid.append(Bucket(handle, packed.checksum, packed.tensors, size))

    def finish(self) -> tuple[Bucket, ...]:
        self._arenas[-1].stamp(self._version)
        return tuple(self._laid)

    def close(self) -> None:
        self._laid = []
        self._arenas.clear()


def _require_memory(size: int) -> None:
    free = _free_memory()
    if size > free:
        raise UserError(
            f"no room to share weights in memory: a bucket needs {size >> 20} MiB and {free >> 20} "
            "MiB are free; lower transfer.bucket_mb, or use transfer.transport=object_store"
        )


def _free_memory() -> int:
    """Bytes that this machine, and this container, can still give."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    with suppress(OSError, ValueError):  # "max" is no number, and means no limit
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return int(free)


@dataclass(frozen=True, slots=True)
class Shared:
    """A bucket in the memory of a card, opened by processes that use the same card."""

    rebuild: Any
    arguments: tuple[Any, ...]

    def take(self, version: int, buckets: Sequence[Bucket], worker: str) -> Iterator[torch.Tensor]:
        """The learner's own memory."""
        del version, worker
        for bucket in buckets:
            shared: Shared = bucket.handle  # type: ignore[assignment]
            yield shared.rebuild(*shared.arguments)[: bucket.bytes]


class Ipc:
    """CUDA IPC: workers open the learner's memory on their common card. Two sets of buffers, used
    in turn as in `SharedMemory`; that a slow reader's was overwritten shows in its checksum."""

    name = "ipc"

    def __init__(self) -> None:
        self._sets: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._laid: list[Bucket] = []

    def begin(self, version: int) -> None:
        del version
        self._sets = (self._sets[1], self._sets[0])
        self._laid = []

    def room(self, size: int) -> torch.Tensor:
        buffers, place = self._sets[0], len(self._laid)
        if place == len(buffers):
            buffers.append(torch.empty(0, dtype=torch.uint8, device="cuda"))
        if len(buffers[place]) < size:
            buffers[place] = torch.empty(size, dtype=torch.uint8, device="cuda")
        return buffers[place]

    def lay(self, packed: Packed) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        torch.cuda.current_stream().synchronize()
        rebuild, arguments = reduce_tensor(self._sets[0][len(self._laid)])
        handle = Shared(rebuild, arguments)
        self._laid.append(Bucket(handle, packed.checksum, packed.tensors, len(packed.data)))

    def finish(self) -> tuple[Bucket, ...]:
        return tuple(self._laid)

    def close(self) -> None:
        self._sets, self._laid = ([], []), []
