"""A worker's end of a broadcast of weights, and what both ends say and do."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from raylign.training.buckets import Bucket, SyncError

_MESSAGE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Staged:
    """A bucket that the learner holds ready to be sent."""

    host: str
    port: int
    token: str
    on_card: bool
    deadline_s: float

    def take(self, version: int, buckets: Sequence[Bucket], worker: str) -> Iterator[torch.Tensor]:
        """As the learner sends them. Raises `SyncError` when the learner is gone, holds the version
        no longer, or completed no session within the deadline."""
        try:
            link = _open_link(self)
        except OSError as error:
            raise SyncError(f"the learner at {self.host}:{self.port} is gone ({error})") from None
        complete = False
        try:
            yield from link.take(version, buckets, worker)
            complete = True
        finally:
            if not complete:  # the learner sees the connection close
                link.close()
                _open_link.cache_clear()


class _Link:
    """A worker's connection to the learner, and the group they are in."""

    def __init__(self, staged: Staged) -> None:
        self._staged = staged
        stall = staged.deadline_s / 4
        self._span = timedelta(seconds=stall)
        control = socket.create_connection((staged.host, staged.port), timeout=stall)
        self._own = control.getsockname()[0]
        control.settimeout(None)
        self._connection = Connection(control.detach())
        self._generation = -1
        self._group: Any = None
        self._buffers: list[torch.Tensor] = []

    def take(self, version: int, buckets: Sequence[Bucket], worker: str) -> Iterator[torch.Tensor]:
        limit = time.monotonic() + self._staged.deadline_s
        request = {"token": self._staged.token, "name": worker, "version": version}
        self._tell(request)
        given = 0
        while True:
            order = self._hear(limit)
            try:
                self._enter(order)
                for place, bucket in enumerate(buckets):
                    buffer = self._buffer(place, bucket.bytes)
                    work = start_broadcast(self._group, buffer, self._span)
                    finish_broadcast(work, buffer, self._span)
                    if place >= given:  # an earlier session may have got so far
                        self._tell({"progress": place})
                        yield buffer
                        given += 1
            except (RuntimeError, OSError) as error:
                if isinstance(error, SyncError):
                    raise
                self._leave()
                self._tell({"failed": str(error).splitlines()[0]})
                continue
            self._tell({"done": version})
            return

    def close(self) -> None:
        self._leave()
        self._connection.close()

    def _hear(self, limit: float) -> dict[str, Any]:
        if not self._connection.poll(max(0.0, limit - time.monotonic())):
            raise SyncError(
                f"the learner did not send it within {self._staged.deadline_s:.0f} s "
                "(transfer.deadline_s)"
            )
        order = receive_message(self._connection)
        if order is None:
            raise SyncError("the learner is gone, or has given up on this worker")
        if "error" in order:
            raise SyncError(str(order["error"]))
        return order

    def _tell(self, message: dict[str, Any]) -> None:
        if not send_message(self._connection, message):
            raise SyncError("the learner is gone, or has given up on this worker")

    def _enter(self, order: dict[str, Any]) -> None:
        if order["generation"] == self._generation and self._group is not None:
            return
        self._leave()
        store = dist.TCPStore(self._staged.host, order["port"], is_master=False, timeout=self._span)
        self._group = join_group(
            store,
            order["generation"],
            order["rank"],
            order["size"],
            self._own,
            self._staged.on_card,
            self._span,
        )
        self._generation = order["generation"]

    def _leave(self) -> None:
        if self._group is not None:
            with suppress(RuntimeError):
                self._group.abort()
        self._group = None

    def _buffer(self, place: int, size: int) -> torch.Tensor:
        """Of its own for every bucket: tensors of several may be joined."""
        if self._staged.on_card:
            return torch.empty(size, dtype=torch.uint8, device="cuda")
        if place == len(self._buffers):
            self._buffers.append(torch.empty(size, dtype=torch.uint8))
        if len(self._buffers[place]) < size:
            self._buffers[place] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[place][:size]


@lru_cache(maxsize=1)
def _open_link(staged: Staged) -> _Link:
    return _Link(staged)


def join_group(
    store: dist.Store,
    generation: int,
    rank: int,
    size: int,
    own: str,
    on_card: bool,
    span: timedelta,
) -> Any:
    """A group apart from the process's default one, which training uses. own: the address of this
    member that the others reach."""
    named = dist.PrefixStore(f"weights/{generation}", store)
    named.set_timeout(span)
    if on_card:
        cards = dist.ProcessGroupNCCL.Options()
        cards._timeout = span
        return dist.ProcessGroupNCCL(named, rank, size, cards)
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = span
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=own)]
    return dist.ProcessGroupGloo(named, rank, size, options)


def start_broadcast(group: Any, buffer: torch.Tensor, span: timedelta) -> Any:
    """Begin to send rank 0's `buffer` to all. Raises `RuntimeError` when a member is gone."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor, options.timeout = 0, 0, span
    return group.broadcast([buffer], options)


def finish_broadcast(work: Any, buffer: torch.Tensor, span: timedelta) -> None:
    """Wait for its end. Raises `RuntimeError` when a member is gone or `span` is over."""
    work.wait(span)
    if buffer.is_cuda:
        torch.cuda.current_stream().synchronize()


def send_message(connection: Connection, message: dict[str, Any]) -> bool:
    """Whether the other side could still be told."""
    try:
        connection.send_bytes(json.dumps(message).encode())
    except OSError:
        return False
    return True


def receive_message(connection: Connection) -> dict[str, Any] | None:
    """None when the other side closed, or says what no worker says."""
    try:
        message = json.loads(connection.recv_bytes(_MESSAGE_BYTES))
    except (OSError, EOFError, ValueError):
        return None
    return message if isinstance(message, dict) else None
