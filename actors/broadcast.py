"""Weights broadcast over a process group of the learner's first rank and the workers: gloo between
CPUs, NCCL between cards.

A collective has no patience with who is absent, so it is never entered on trust. Each worker that
wants a version holds a control connection to the learner. Those that ask at about the same time
make a session: the learner tells each its rank, all join a group (the last one, if its members are
the same) and the buckets go around. A worker that dies closes its connection, one that is stopped
falls silent; either is named and left out, and the session is made again with the others.
"""

from __future__ import annotations

import logging
import queue
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from actors.broadcast_link import (
    Staged,
    finish_broadcast,
    join_group,
    receive_message,
    send_message,
    start_broadcast,
)
from raylign.training.buckets import Bucket, Packed

log = logging.getLogger(__name__)

_GATHER_S = 0.02  # those that ask within it share a session
_MARGIN_S = 1.0
_GLANCE_S = 0.001


@dataclass(frozen=True, slots=True)
class Loss:
    """A worker that a session went on without."""

    worker: str
    version: int
    reason: str


@dataclass(slots=True, eq=False)
class _Member:
    """A worker as the learner sees it."""

    connection: Connection
    name: str = "?"
    wants: int | None = None
    since: float = 0.0
    reported: bool = False
    """Has said how the session went, or closed its connection."""


class Broadcast:
    """The learner's side: staged buckets, and a thread that sends them to whoever asks.

    `take_losses` lists the workers that were given up, by name. The last two versions are held.
    """

    name = "broadcast"

    def __init__(
        self, host: str = "127.0.0.1", *, on_card: bool = False, deadline_s: float = 120.0
    ) -> None:
        """host: the address under which workers reach this process. deadline_s: of a worker that
        wants a version; one that makes no progress for a quarter of it is left out."""
        self._lost: queue.SimpleQueue[Loss] = queue.SimpleQueue()
        self._host, self._on_card = host, on_card
        self._deadline_s, self._stall_s = deadline_s, deadline_s / 4
        self._token = secrets.token_hex(16)
        self._sets: dict[int, list[torch.Tensor]] = {}
        self._staged: dict[int, tuple[Bucket, ...]] = {}
        self._filling: tuple[int, list[torch.Tensor], list[Bucket]] = (-1, [], [])
        self._busy = threading.Lock()
        self._server = socket.create_server((host, 0))
        self._store = dist.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=self._span()
        )
        self._group: Any = None
        self._grouped: list[_Member] = []
        self._generation = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="broadcast", daemon=True)
        self._thread.start()

    def begin(self, version: int) -> None:
        with self._busy:  # a session that sends what is about to be overwritten ends first
            oldest = sorted(self._staged)[:-1] if len(self._staged) > 1 else []
            spare = [buffer for old in oldest for buffer in self._sets.pop(old)]
            for old in oldest:
                del self._staged[old]
            spare += self._sets.pop(version, [])
            self._staged.pop(version, None)
        self._filling = (version, spare, [])
        self._sets[version] = []

    def room(self, size: int) -> torch.Tensor:
        version, spare, _ = self._filling
        fitting = [place for place, buffer in enumerate(spare) if len(buffer) >= size]
        if fitting:
            buffer = spare.pop(fitting[0])
        else:
            device = "cuda" if self._on_card else "cpu"
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._sets[version].append(buffer)
        return buffer

    def lay(self, packed: Packed) -> None:
        port = self._server.getsockname()[1]
        handle = Staged(self._host, port, self._token, self._on_card, self._deadline_s)
        laid = Bucket(handle, packed.checksum, packed.tensors, len(packed.data))
        self._filling[2].append(laid)

    def finish(self) -> tuple[Bucket, ...]:
        version, _, laid = self._filling
        with self._busy:
            self._staged[version] = tuple(laid)
        return tuple(laid)

    def take_losses(self) -> tuple[Loss, ...]:
        """Those that sessions went on without, since the last call."""
        return tuple(self._lost.get() for _ in range(self._lost.qsize()))

    def close(self) -> None:
        self._closed.set()
        self._thread.join(self._deadline_s)
        self._server.close()
        self._sets.clear()
        self._staged.clear()

    def _span(self) -> timedelta:
        return timedelta(seconds=self._stall_s)

    def _serve(self) -> None:
        members: list[_Member] = []
        while not self._closed.is_set():
            waiting = [m.since for m in members if m.wants is not None]
            patience = max(0.0, min(waiting) + _GATHER_S - time.monotonic()) if waiting else 0.2
            for ready in wait([self._server, *(m.connection for m in members)], patience):
                if ready is self._server:
                    accepted = self._server.accept()[0].detach()
                    members.append(_Member(Connection(accepted)))
                    continue
                member = next(m for m in members if m.connection is ready)
                if not self._hear_request(member):
                    members.remove(member)
                    member.connection.close()
            waiting = [m.since for m in members if m.wants is not None]
            if waiting and time.monotonic() >= min(waiting) + _GATHER_S:
                first = min((m for m in members if m.wants is not None), key=lambda m: m.since)
                chosen = [m for m in members if m.wants == first.wants]
                for gone in self._hold_session(first.wants, chosen):
                    members.remove(gone)
                    gone.connection.close()
        for member in members:
            member.connection.close()

    def _hear_request(self, member: _Member) -> bool:
        message = receive_message(member.connection)
        if message is None or message.get("token") != self._token:
            return False
        member.name, member.wants = str(message["name"]), int(message["version"])
        member.since = time.monotonic()
        return True

    def _hold_session(self, version: int | None, members: list[_Member]) -> list[_Member]:
        """Send a version to `members`. Those to be left out are returned; those that a failure of
        others hit want it again."""
        assert version is not None
        for member in members:
            member.reported = False
        with self._busy:
            if version not in self._staged:
                for member in members:
                    member.wants = None
                    send_message(member.connection, {"error": "the learner holds it no longer"})
                return []
            try:
                self._send_buckets(version, members)
                failure = None
            except (RuntimeError, OSError) as error:  # what torch.distributed raises
                failure = error
                self._drop_group()
            silent = self._find_silent(members)
        for member in silent:
            reason = (
                "its connection closed"
                if member.connection.closed
                else f"made no progress for {self._stall_s:.0f} s"
            )
            self._lost.put(Loss(member.name, version, reason))
            log.warning(
                "broadcast of version %d goes on without %s: %s", version, member.name, reason
            )
        if silent or failure is not None:
            self._drop_group()
        return silent

    def _send_buckets(self, version: int, members: list[_Member]) -> None:
        fresh = self._group is None or self._grouped != members
        if fresh:
            self._drop_group()
            self._generation += 1
        order = {
            "generation": self._generation,
            "size": len(members) + 1,
            "port": self._store.port,
        }
        for rank, member in enumerate(members, 1):
            send_message(member.connection, order | {"rank": rank})
        if fresh:
            self._group = join_group(
                self._store,
                self._generation,
                0,
                len(members) + 1,
                self._host,
                self._on_card,
                self._span(),
            )
            self._grouped = list(members)
        for bucket, buffer in zip(self._staged[version], self._sets[version], strict=True):
            work = start_broadcast(self._group, buffer[: bucket.bytes], self._span())
            while not work.is_completed():
                self._hear_reports(members, _GLANCE_S)
                if any(member.connection.closed for member in members):
                    raise RuntimeError("a member's connection closed")
            finish_broadcast(work, buffer, self._span())

    def _hear_reports(self, members: list[_Member], seconds: float) -> bool:
        """Read what members say within some time; whether any said something. The connection of
        one that closed it is closed."""
        talking = [m for m in members if not m.connection.closed and not m.reported]
        ready = wait([m.connection for m in talking], seconds)
        for member in talking:
            if member.connection not in ready:
                continue
            message = receive_message(member.connection)
            if message is None:
                member.connection.close()
            elif "done" in message:
                member.wants = None
            member.reported = message is None or "progress" not in message
        return bool(ready)

    def _find_silent(self, members: list[_Member]) -> list[_Member]:
        """Those that closed their connection, or say nothing while others' time runs out."""
        limit = time.monotonic() + self._stall_s + _MARGIN_S
        while not all(m.reported for m in members) and time.monotonic() < limit:
            if self._hear_reports(members, limit - time.monotonic()):
                limit = time.monotonic() + self._stall_s + _MARGIN_S
        return [m for m in members if m.connection.closed or not m.reported]

    def _drop_group(self) -> None:
        if self._group is not None:
            with suppress(RuntimeError):
                self._group.abort()
        self._group, self._grouped = None, []
