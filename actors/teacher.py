"""Answers of one fixed model to a long list of requests, from a pool of rollout workers.

The pool and its workers are those of reinforcement learning; here the weights never change, so a
worker serves what it loaded. Workers start with the first request that has no answer yet: when all
are known, none starts.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray

from actors.placement import place_rollout
from actors.rollout import RolloutWorker
from actors.rollout_pool import RolloutPool
from actors.supervision import BudgetSpent, PromptLost
from actors.weights import Canary, SyncProof, WeightManifest
from raylign.config import RolloutConfig, UserError
from raylign.data.synthesis.answers import Answer
from raylign.inference.generator import Sampling
from raylign.records import Prompt
from raylign.runtime import derive_seed

T = TypeVar("T")

# Answers come out in the order of the requests. So many times the requests that are in flight may
# wait behind one that is late before the engines run out of work.
_LOOKAHEAD = 8


@dataclass(frozen=True, slots=True, eq=False)
class Request(Generic[T]):
    """One completion that is wanted."""

    key: str
    """What its answer is kept under."""
    token_ids: tuple[int, ...]
    seed: int
    known: Answer | None
    """The answer, where there is one already: nothing is asked."""
    payload: T
    """Whatever the caller wants back with the answer."""


class TeacherWorker(RolloutWorker):
    """A rollout worker that serves the weights of its model directory."""

    def adopt(self, manifest: WeightManifest, tolerance: float, restart: bool = False) -> SyncProof:
        """Nothing was published: the loaded weights are version 0."""
        now = time.time()
        return SyncProof(manifest.version, manifest.checksum, 0.0, now, now)


class TeacherPool:
    """Rollout workers that serve the model in a directory."""

    def __init__(
        self, config: RolloutConfig, model: Path, max_length: int, seed: int, key: str
    ) -> None:
        """`key` is the section of the recipe that errors name, such as `synthesise.rollout`."""
        self._config, self._key = config, key
        self._lookahead = config.count * config.max_sequences * _LOOKAHEAD
        self._slots = asyncio.Semaphore(config.count * config.max_sequences)
        self._starting = asyncio.Lock()
        self._pool: RolloutPool | None = None
        self.generated = 0
        """Answers that were not known."""
        self.generated_tokens = 0
        self.started: float | None = None
        """When the pool could take its first request (monotonic seconds)."""

        def spawn(name: str) -> Any:
            actor = ray.remote(TeacherWorker).options(**place_rollout(config))
            return actor.remote(name, model, config, max_length, derive_seed(seed, name))

        self._spawn = spawn

    async def answer(
        self,
        requests: Iterable[Request[T]],
        sampling: Sampling,
        keep: Callable[[str, Answer], None],
    ) -> AsyncGenerator[tuple[Request[T], Answer], None]:
        """Every request with its answer, in the order of the requests.

        `keep(key, answer)` hears of each new answer as soon as it is there, in any order. Raises
        `UserError` when the cluster is too small or too many workers had to be replaced.
        """
        waiting: deque[tuple[Request[T], asyncio.Task[Answer] | None]] = deque()
        source = iter(requests)
        exhausted = False
        try:
            while waiting or not exhausted:
                while not exhausted and len(waiting) < self._lookahead:
                    request = next(source, None)
                    if request is None:
                        exhausted = True
                    elif request.known is not None:
                        waiting.append((request, None))
                    else:
                        task = asyncio.create_task(self._ask(request, sampling, keep))
                        waiting.append((request, task))
                if waiting:
                    request, pending = waiting.popleft()
                    if pending is None:
                        assert request.known is not None
                        yield request, request.known
                    else:
                        waiting.appendleft((request, pending))  # to be cancelled if this is
                        answer = await pending
                        waiting.popleft()
                        yield request, answer
        except (BudgetSpent, PromptLost) as error:
            raise UserError(
                f"{self._key}: {error}; see its worker's log, and check model and memory"
            ) from None
        finally:
            for _, pending in waiting:
                if pending is not None:
                    pending.cancel()

    async def _ask(
        self, request: Request[T], sampling: Sampling, keep: Callable[[str, Answer], None]
    ) -> Answer:
        async with self._slots:
            pool = await self._ready()
            prompt = Prompt(request.key, request.token_ids, "", "")
            own = replace(sampling, seed=request.seed)
            rollout = await pool.generate(prompt, request.key, own, 1, oldest=0)
        [trajectory] = rollout.trajectories
        answer = Answer(
            text=trajectory.text,
            finish_reason=trajectory.finish_reason,
            tokens=trajectory.sampled_tokens,
            version=max(trajectory.version_span[1], 0),
        )
        self.generated += 1
        self.generated_tokens += answer.tokens
        keep(request.key, answer)
        return answer

    async def _ready(self) -> RolloutPool:
        async with self._starting:
            if self._pool is None:
                _check_cluster(self._config, self._key)
                self._pool = RolloutPool(self._config, self._spawn, lambda worker, proof: None)
                await self._pool.start(WeightManifest(0, (), Canary((), ())))
                self.started = time.monotonic()
            return self._pool

    def tokens_per_second(self) -> float:
        """Of the generated tokens, since the workers were ready; 0 when none started."""
        if self.started is None:
            return 0.0
        return self.generated_tokens / max(time.monotonic() - self.started, 1e-9)

    def stop(self) -> None:
        """Kill all workers."""
        if self._pool is not None:
            self._pool.stop()


def _check_cluster(config: RolloutConfig, key: str) -> None:
    """Ray would wait without end for what the cluster does not have."""
    present = ray.cluster_resources()
    for kind, each in (("CPU", config.cpus), ("GPU", config.gpus)):
        wanted, there = config.count * each, present.get(kind, 0.0)
        if wanted > there + 1e-9:
            raise UserError(
                f"{key}: {config.count} workers need {wanted:g} {kind}, the cluster has {there:g}; "
                f"lower {key}.count or {key}.{kind.lower()}s"
            )
