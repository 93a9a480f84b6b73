"""One rollout worker as its pool sees it: what it was handed, and whether it gets on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from actors.rollout import Answer, Errand, Pulse, Rollout, RolloutRequest
from actors.supervision import INFRASTRUCTURE, Stalled
from actors.weights import SyncProof, WeightManifest
from raylign.inference.episode import Episode

# After any of these a worker is given up: its process is gone or silent, or its generator broke.
LOST = (*INFRASTRUCTURE, RayTaskError)
PULSE_S = 1.0


@dataclass(slots=True, eq=False)
class Work:
    """A request on its way."""

    request: RolloutRequest
    future: asyncio.Future[Rollout]
    begun: tuple[Episode, ...] = ()
    """What a worker that let go of it had sampled."""
    losses: list[str] = field(default_factory=list)
    """Workers that were lost or late with it, and how."""
    since: float = 0.0
    """When a worker got it (monotonic seconds)."""
    holder: Member | None = None
    """The worker that has it, and what it calls it there."""
    key: str = ""

    @property
    def floor(self) -> int:
        """Version that a worker must have proved: what was asked for, and no older than the newest
        token that is there, for a sequence's versions never fall."""
        spans = [span for episode in self.begun if (span := episode.versions)]
        return max([self.request.oldest, *(newest for _, newest in spans)])

    def take_back(self, episodes: tuple[Episode, ...]) -> None:
        """Keep what is there, but what began under a version that is too old."""
        oldest = self.request.oldest
        self.begun = tuple(
            Episode() if (span := episode.versions) and span[0] < oldest else episode
            for episode in episodes
        )


@dataclass(slots=True, eq=False)
class Parcel:
    """Requests that one worker gets at once."""

    works: list[Work]
    ordered: bool = False
    """What is sampled for them is to depend on nothing but them and the weights."""
    alone: bool = False
    """They, or what they do to a worker, are not to be mixed up with others."""

    @property
    def exclusive(self) -> bool:
        return self.ordered or self.alone

    @property
    def floor(self) -> int:
        return max(work.floor for work in self.works)

    @property
    def spurned(self) -> set[str]:
        """Workers that were lost or late with it."""
        return {loss.partition(":")[0] for work in self.works for loss in work.losses}

    @property
    def open(self) -> bool:
        return any(not work.future.done() for work in self.works)


class Member:
    """A worker of the pool."""

    def __init__(self, name: str, number: int, handle: ActorHandle, optional: bool) -> None:
        self.name, self.number, self._handle = name, number, handle
        self.optional = optional
        """Whether the run goes on without it if it does not come to serve."""
        self.born: asyncio.Future[str] = asyncio.Future()
        """Its name, or that of its successor, once that serves."""
        self.version = -1
        """Last version proved; -1 before the first proof."""
        self.serving = self.draining = False
        self.sync = asyncio.Lock()
        self.task: asyncio.Task[None] | None = None
        self.parcel: Parcel | None = None
        """The exclusive one that it is at."""
        self.work: dict[str, Work] = {}
        self._outbox: list[Errand] = []
        self._late: dict[str, float] = {}
        self._keys: Iterator[int] = count()
        self._steps = -1
        self._progress = self._answered = time.monotonic()
        self.load = 0
        """Completions in flight."""

    def has_room(self, most: int) -> bool:
        """Whether it may be handed anything, with fewer than `most` completions in flight."""
        able = self.serving and not self.draining and self.parcel is None
        return able and self.load < most

    def may_have(self, parcel: Parcel, floor: int) -> bool:
        """Whether a worker with room may have this parcel, which needs version `floor`."""
        return self.version >= floor and not (parcel.exclusive and self.work)

    def hand(self, parcel: Parcel) -> None:
        """Put a parcel into the outbox; `send` sends it."""
        now = time.monotonic()
        if not self.work:
            self._progress = now
        if parcel.exclusive:
            self.parcel = parcel
        for work in parcel.works:
            work.since = now
            work.holder, work.key = self, str(next(self._keys))
            self.work[work.key] = work
            self.load += work.request.count
            self._outbox.append(Errand(work.key, work.request, work.begun))

    def take(self, key: str) -> Work | None:
        """A work that is no longer its own."""
        work = self.work.pop(key, None)
        self._late.pop(key, None)
        if work is not None:
            self.load -= work.request.count
            if work.holder is self and work.key == key:
                work.holder = None
        if not self.work:
            self.parcel = None
        return work

    def late(self, deadline_s: float) -> list[str]:
        """Requests without an answer for so long, each told once. An ordered parcel's are on their
        way as long as any of them is."""
        now = time.monotonic()
        if self.parcel is not None and self.parcel.ordered:
            latest = max(self._answered, self.parcel.works[0].since)
            if now - latest < deadline_s:
                return []
        keys = [k for k, w in self.work.items() if now - w.since > deadline_s]
        fresh = [key for key in keys if key not in self._late]
        self._late |= dict.fromkeys(fresh, now)
        return fresh

    def blame(self, reason: str) -> list[Work]:
        """What it leaves unfinished, now that it is lost; those it was late with know of it."""
        works = [work for work in self.work.values() if not work.future.done()]
        for work in works:
            if work.key not in self._late:
                work.losses.append(reason)
        return works

    async def send(self) -> None:
        """Hand over what is in the outbox, in one call."""
        errands, self._outbox = self._outbox, []
        ordered = self.parcel is not None and self.parcel.ordered
        await self._handle.submit.remote(errands, ordered)

    async def wake(self, deadline_s: float) -> None:
        """Wait until its generator is ready. Raises `Stalled`."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._handle.ping.remote()
        except TimeoutError:
            raise Stalled(
                f"not started within {deadline_s:g} s; is there room for it in the cluster?"
            ) from None

    async def adopt(
        self, manifest: WeightManifest, tolerance: float, restart: bool, deadline_s: float
    ) -> SyncProof:
        """Have it prove a version. Raises `Stalled`."""
        call = self._handle.adopt.remote(manifest, tolerance, restart)
        try:
            async with asyncio.timeout(deadline_s):
                proof: SyncProof = await call
        except TimeoutError:
            raise Stalled(
                f"version {manifest.version} not proved within {deadline_s:g} s"
            ) from None
        self.version = proof.version
        return proof

    async def watch(
        self, stall_s: float, hear: Callable[[Member, tuple[Answer, ...]], None]
    ) -> None:
        """Pass on what it finishes, for ever. Raises one of `LOST` when it is no longer of use."""
        while True:
            try:
                # Not wait_for: Python 3.11's may swallow a cancellation, and this would go on.
                async with asyncio.timeout(stall_s + PULSE_S):
                    pulse: Pulse = await self._handle.pulse.remote(PULSE_S)
            except TimeoutError:
                raise Stalled(f"silent for {stall_s:g} s") from None
            now = time.monotonic()
            if pulse.steps != self._steps or pulse.busy or pulse.answers or not self.work:
                self._steps, self._progress = pulse.steps, now
            if pulse.answers:
                self._answered = now
            hear(self, pulse.answers)
            if pulse.broken:
                raise Stalled(pulse.broken)
            if now - self._progress > stall_s:
                raise Stalled(f"no token in {stall_s:g} s, with {self._list_work()}")
            self._find_lost(now, stall_s, pulse.busy)

    def _find_lost(self, now: float, patience_s: float, busy: bool) -> None:
        """A request that was late and is not given back either: whoever had it does not know it
        any more. Raises `Stalled`."""
        for key, told in self._late.items():
            if busy:  # it gives back between two steps, and makes none
                self._late[key] = now
            elif now - told > patience_s and not self.work[key].future.done():
                prompt = self.work[key].request.prompt.id
                raise Stalled(
                    f"prompt {prompt}: neither answered nor given back within {patience_s:g} s of "
                    "its deadline"
                )

    def _list_work(self) -> str:
        prompts = sorted({work.request.prompt.id for work in self.work.values()})
        more = ", ..." if len(prompts) > 3 else ""
        return f"{len(self.work)} requests (of prompt {', '.join(prompts[:3])}{more})"

    async def withdraw(self, keys: Iterable[str]) -> None:
        """Have it stop requests; what is there of them comes by pulse."""
        await self._handle.withdraw.remote(list(keys))

    def kill(self) -> None:
        """End its process, whatever it does."""
        ray.kill(self._handle)
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()
