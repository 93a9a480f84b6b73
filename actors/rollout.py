"""Rollout workers, and the elastic pool that hands them groups of prompts.

A worker wraps a generator loop. The pool knows which policy version each worker has proved, gives
work only to workers that are fresh enough, gives every request a deadline, and replaces workers
that die or hang; a lost request is simply made again elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from actors.supervision import INFRASTRUCTURE, Budget
from actors.weights import SyncProof, WeightManifest, adopt_weights
from raylign.config import RolloutConfig
from raylign.inference.generator import Sample, Sampling, build_generator
from raylign.inference.serving import GeneratorLoop
from raylign.records import Prompt, Trajectory

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """The completions of one prompt, and when and where they were made."""

    trajectories: tuple[Trajectory, ...]
    worker: str
    start: float
    end: float


class RolloutWorker:
    """One generator behind a Ray actor; methods may run at the same time."""

    def __init__(
        self, name: str, model: Path, config: RolloutConfig, max_length: int, seed: int
    ) -> None:
        self._name = name
        generator = build_generator(
            config.backend,
            model,
            dtype=config.dtype,
            max_length=max_length,
            kv_cache_mb=config.kv_cache_mb,
            max_sequences=config.max_sequences,
            threads=config.threads,
            seed=seed,
        )
        self._loop = GeneratorLoop(generator)

    def ping(self) -> str:
        """Answers once the generator is ready."""
        return self._name

    def generate(self, prompt: Prompt, group: str, sampling: Sampling, count: int) -> Rollout:
        """`count` completions of `prompt`."""
        start = time.time()
        samples = self._loop.submit(prompt.token_ids, sampling, count).result()
        return Rollout(
            trajectories=tuple(to_trajectory(prompt, group, sample) for sample in samples),
            worker=self._name,
            start=start,
            end=time.time(),
        )

    def adopt(self, manifest: WeightManifest, tolerance: float) -> SyncProof:
        """Pull, load and prove a policy version; generation goes on under it."""
        start = time.time()
        error = self._loop.call(lambda g: adopt_weights(g, manifest, tolerance)).result()
        return SyncProof(manifest.version, manifest.checksum, error, start, time.time())


def to_trajectory(prompt: Prompt, group: str, sample: Sample) -> Trajectory:
    """Prompt and completion as one sequence; only sampled tokens are trained."""
    before, sampled = len(prompt.token_ids), len(sample.token_ids)
    return Trajectory(
        prompt_id=prompt.id,
        group_id=group,
        token_ids=np.array(prompt.token_ids + sample.token_ids, np.int32),
        loss_mask=np.arange(before + sampled) >= before,
        logprobs=np.concatenate([np.zeros(before, np.float32), sample.logprobs]),
        versions=np.concatenate([np.full(before, -1, np.int32), sample.versions]),
        finish_reason=sample.finish_reason,
        text=sample.text,
    )


@dataclass(slots=True)
class _Member:
    """What the pool knows of one worker."""

    name: str
    handle: ActorHandle
    version: int = -1
    """Last version proved; -1 before the first proof."""
    load: int = 0
    """Groups in flight."""
    sync: asyncio.Lock = field(default_factory=asyncio.Lock)


class RolloutPool:
    """The rollout workers of a run."""

    def __init__(
        self,
        config: RolloutConfig,
        spawn: Callable[[str], ActorHandle],
        on_sync: Callable[[str, SyncProof], None],
    ) -> None:
        """`spawn` starts a worker of the given name; `on_sync` hears of every proved sync."""
        self._config, self._spawn, self._on_sync = config, spawn, on_sync
        self._members: dict[str, _Member] = {}
        self._born = 0
        self._manifest: WeightManifest | None = None
        self._changed = asyncio.Condition()
        self._budget = Budget("rollout worker", config.max_restarts)
        self._idle_since: float | None = None
        self._idle_seconds = 0.0

    async def start(self, manifest: WeightManifest) -> None:
        """Start the configured number of workers and prove the first policy version on each."""
        self._manifest = manifest
        await asyncio.gather(*(self.add() for _ in range(self._config.count)))

    async def add(self) -> str:
        """One more worker; it pulls the current version, proves it, then serves."""
        name = f"rollout-{self._born}"
        self._born += 1
        member = _Member(name, self._spawn(name))
        self._members[name] = member
        try:
            await asyncio.wait_for(member.handle.ping.remote(), self._config.start_deadline_s)
        except INFRASTRUCTURE as error:
            return await self._replace(member, error)
        await self._sync(member)
        return name

    async def remove(self, name: str) -> None:
        """Let a worker finish what it has, then stop it."""
        member = self._members.pop(name)
        async with self._changed:
            await self._changed.wait_for(lambda: member.load == 0)
        ray.kill(member.handle)

    @property
    def names(self) -> list[str]:
        return list(self._members)

    async def publish(self, manifest: WeightManifest) -> None:
        """Bring every worker to a new version; returns when all have proved it."""
        self._manifest = manifest
        await asyncio.gather(*(self._sync(member) for member in list(self._members.values())))

    async def generate(
        self, prompt: Prompt, group: str, sampling: Sampling, count: int, oldest: int
    ) -> Rollout:
        """`count` completions by a worker that has proved version `oldest` or a later one.

        A worker that dies or misses the deadline is replaced and the request made again. Raises
        `BudgetSpent` when too many had to be replaced, `ValueError` when the prompt is at fault.
        """
        while True:
            member = await self._acquire(oldest)
            try:
                return await asyncio.wait_for(
                    member.handle.generate.remote(prompt, group, sampling, count),
                    self._config.deadline_s,
                )
            except INFRASTRUCTURE as error:
                await self._replace(member, error)
            finally:
                await self._release(member)

    async def _acquire(self, oldest: int) -> _Member:
        async with self._changed:
            await self._changed.wait_for(lambda: self._ready(oldest))
            member = min(self._ready(oldest), key=lambda m: (m.load, m.name))
            member.load += 1
            if self._idle_since is not None:
                self._idle_seconds += time.monotonic() - self._idle_since
                self._idle_since = None
            return member

    def _ready(self, oldest: int) -> list[_Member]:
        return [m for m in self._members.values() if m.version >= oldest]

    async def _release(self, member: _Member) -> None:
        async with self._changed:
            member.load -= 1
            if not any(m.load for m in self._members.values()):
                self._idle_since = time.monotonic()
            self._changed.notify_all()

    async def _sync(self, member: _Member) -> None:
        assert self._manifest is not None
        async with member.sync:
            manifest = self._manifest
            if member.version >= manifest.version:
                return
            try:
                proof: SyncProof = await asyncio.wait_for(
                    member.handle.adopt.remote(manifest, self._config.canary_tolerance),
                    self._config.deadline_s,
                )
            except INFRASTRUCTURE as error:
                await self._replace(member, error)
                return
        log.debug("%s proved version %d", member.name, proof.version)
        member.version = proof.version
        self._on_sync(member.name, proof)
        async with self._changed:
            self._changed.notify_all()

    async def _replace(self, member: _Member, error: BaseException) -> str:
        """Kill a failed worker and start its successor, whose name is returned; a worker that
        another request has already replaced is left at that."""
        if self._members.get(member.name) is not member:
            return member.name
        del self._members[member.name]
        ray.kill(member.handle)
        self._budget.spend(f"{member.name}: {_describe(error)}")
        return await self.add()

    def take_idle_seconds(self) -> float:
        """Seconds without any group in flight since the last call."""
        seconds, self._idle_seconds = self._idle_seconds, 0.0
        return seconds

    def stop(self) -> None:
        """Kill all workers."""
        for member in self._members.values():
            ray.kill(member.handle)
        self._members.clear()


def _describe(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer within its deadline"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'died'}"


def spawn_rollout_worker(name: str, options: dict[str, Any], *arguments: Any) -> ActorHandle:
    """Start a `RolloutWorker` actor with the given Ray resources."""
    actor = ray.remote(RolloutWorker).options(**options)
    return actor.remote(name, *arguments)
