"""Reward workers: each scores groups, one at a time, at arm's length from the run.

What scores may be the user's code, so a worker is disposable: one that dies, hangs or grows is
replaced and its group given to another. In the last attempt each completion goes alone, so that
the one at fault is found; it is set aside with the reason, and never scored zero.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from actors.supervision import INFRASTRUCTURE, Budget
from raylign.config import RewardConfig, UserError
from raylign.records import Prompt, Trajectory
from raylign.rewards.outcomes import Measured, Scored, SourceFailure, reject
from raylign.rewards.panel import ONLY, Panel, allow_seconds

# A worker that has not loaded its sources by then never will.
_START_S = 600.0
# The same of one that is added to a run, which goes on without it.
_JOIN_S = 120.0
# What a worker may take beyond what it had when it was ready.
_GROWTH = 1 << 30


Span = tuple[str, float, float]
"""Who, from when to when."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """A scored group, and when and where."""

    scored: Scored
    worker: str
    start: float
    end: float
    others: tuple[Span, ...] = ()
    """Who else scored it, from when to when."""


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """What all sources say of a group, by their names and in its order, and when and where."""

    measured: dict[str, list[Measured]]
    worker: str
    start: float
    end: float
    memory: int = 0
    """Bytes that the worker held afterwards."""


class RewardWorker:
    """The sources of a recipe behind a Ray actor."""

    def __init__(self, name: str, config: RewardConfig, policy: Path | None) -> None:
        self._name, self._config, self._policy = name, config, policy

    def load(self) -> int:
        """Load every source; bytes of memory that this took. Raises `UserError` for one that cannot
        be, which a constructor could not tell from a crash."""
        if "model" in {self._config.source, *(p.source for p in self._config.parts.values())}:
            import torch

            torch.set_num_threads(self._config.threads)
        self._panel = Panel(self._config, self._policy)
        return psutil.Process().memory_info().rss

    def measure(self, trajectories: tuple[Trajectory, ...], prompt: Prompt) -> Measurement:
        """What every source says of the completions of `prompt`."""
        start = time.time()
        measured = self._panel.measure(trajectories, prompt)
        memory = psutil.Process().memory_info().rss
        return Measurement(measured, self._name, start, time.time(), memory)


class RewardPool:
    """The reward workers of a run; a group waits for the first that is free."""

    def __init__(self, config: RewardConfig, spawn: Callable[[str], ActorHandle]) -> None:
        self._config, self._spawn = config, spawn
        self._budget = Budget("reward worker", config.max_restarts)
        self._workers: dict[str, ActorHandle] = {}
        self._memory: dict[str, int] = {}
        """Of workers that are ready, when they became so."""
        self._free: list[str] = []
        self._waiting: deque[asyncio.Future[str]] = deque()
        self._leaving = 0
        self._born = 0
        self._names = sorted(config.parts) or [ONLY]
        self._free = [self._enlist() for _ in range(config.count)]

    @property
    def count(self) -> int:
        """Workers, without those that will leave."""
        return len(self._workers) - self._leaving

    @property
    def failures(self) -> tuple[str, ...]:
        """Why workers were replaced, so far."""
        return tuple(self._budget.reasons)

    async def scale(self, count: int) -> str:
        """Have `count` workers; what was done, in words. Newcomers score once they have loaded
        their sources, and one that is at work leaves when it is done.

        Raises `UserError` for less than one worker, or when newcomers do not come to serve.
        """
        if count < 1:
            raise UserError(f"rewards={count}: at least 1 worker must stay")
        before = self.count
        self._leaving -= min(self._leaving, max(count - self.count, 0))
        newcomers = [self._enlist() for _ in range(count - self.count)]
        joining = (self._load(name, _JOIN_S) for name in newcomers)
        found = await asyncio.gather(*joining, return_exceptions=True)
        for name, error in zip(newcomers, found, strict=True):
            if error is None:
                self._give_back(name)
            else:
                self._dismiss(name)
        lost = [error for error in found if error is not None]
        if lost:
            raise UserError(
                f"rewards={count}: {len(lost)} of {len(found)} new workers did not come to serve, "
                f"{self.count} do ({type(lost[0]).__name__}); is there room on the cluster?"
            )
        self._leaving += max(self.count - count, 0)
        while self._leaving and self._free:
            self._leaving -= 1
            self._dismiss(self._free.pop())
        return f"{self.count} workers, {before} before"

    async def measure(self, trajectories: tuple[Trajectory, ...], prompt: Prompt) -> Measurement:
        """What every source says of one group.

        Raises `UserError` of the sources themselves, `BudgetSpent` when too many workers were lost.
        """
        start, reason = time.time(), ""
        for attempt in range(self._config.attempts):
            if attempt and attempt == self._config.attempts - 1 and len(trajectories) > 1:
                return await self._measure_alone(trajectories, prompt, start)
            outcome = await self._try(trajectories, prompt)
            if isinstance(outcome, Measurement):
                return outcome
            reason = outcome
        lost: list[Measured] = [reject(t, f"quarantined: {reason}") for t in trajectories]
        return Measurement({name: lost for name in self._names}, "reward", start, time.time())

    def stop(self) -> None:
        """Kill all workers."""
        for name in list(self._workers):
            self._dismiss(name)
        for waiting in self._waiting:
            waiting.cancel()
        self._waiting.clear()

    async def _measure_alone(
        self, trajectories: Sequence[Trajectory], prompt: Prompt, start: float
    ) -> Measurement:
        outcomes = await asyncio.gather(*(self._try((t,), prompt) for t in trajectories))
        measured: dict[str, list[Measured]] = {name: [] for name in self._names}
        worker, memory = "reward", 0
        for trajectory, outcome in zip(trajectories, outcomes, strict=True):
            for name, values in measured.items():
                if isinstance(outcome, Measurement):
                    values += outcome.measured.get(name, [])
                    worker = outcome.worker
                else:
                    values.append(reject(trajectory, f"quarantined: {outcome}"))
        return Measurement(measured, worker, start, time.time(), memory)

    async def _try(self, trajectories: tuple[Trajectory, ...], prompt: Prompt) -> Measurement | str:
        """The measurement, or why there is none."""
        name = await self._borrow()
        try:
            if name not in self._memory:
                await self._load(name, _START_S)
            own = allow_seconds(self._config, len(trajectories))
            async with asyncio.timeout(self._config.timeout_s + own):
                found: Measurement = await self._workers[name].measure.remote(trajectories, prompt)
            if found.memory - self._memory[name] > _GROWTH:
                grown = (found.memory - self._memory[name]) / 2**30
                self._replace(name, f"it grew by {grown:.1f} GiB")
            return found
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            if isinstance(error.cause, SourceFailure):
                return f"source failed ({str(error.cause).partition(':')[0]})"
            raise
        except INFRASTRUCTURE as error:
            reason = "worker timed out" if isinstance(error, TimeoutError) else "worker died"
            self._replace(name, reason)
            return reason
        finally:
            self._give_back(name)

    def _enlist(self) -> str:
        name = f"reward-{self._born}"
        self._born += 1
        self._workers[name] = self._spawn(name)
        return name

    async def _load(self, name: str, deadline_s: float) -> None:
        async with asyncio.timeout(deadline_s):
            self._memory[name] = await self._workers[name].load.remote()

    def _replace(self, name: str, reason: str) -> None:
        ray.kill(self._workers[name])
        self._memory.pop(name, None)
        self._budget.spend(f"{name}: {reason}")
        self._workers[name] = self._spawn(name)

    async def _borrow(self) -> str:
        if self._free:
            return self._free.pop()
        waiting: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        try:
            return await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled():
                self._give_back(waiting.result())  # came at the same moment
            raise

    def _give_back(self, name: str) -> None:
        if name not in self._workers:
            return  # the pool was stopped meanwhile
        if self._leaving:
            self._leaving -= 1
            self._dismiss(name)
            return
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(name)
                return
        self._free.append(name)

    def _dismiss(self, name: str) -> None:
        ray.kill(self._workers.pop(name))
        self._memory.pop(name, None)


def spawn_reward_worker(
    name: str, options: dict[str, object], config: RewardConfig, policy: Path | None = None
) -> ActorHandle:
    """Start a `RewardWorker` actor with the given Ray resources; `policy` is the directory of the
    model that samples, whose tokens a reward model with the same tokenizer takes as they are."""
    return ray.remote(RewardWorker).options(**options).remote(name, config, policy)
