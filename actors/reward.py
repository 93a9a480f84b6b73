"""Reward workers: each scores groups with one reward function, at arm's length from the run.

The function may be the user's, so a worker is disposable: one that dies or hangs is replaced and
the group scored again, and what still cannot be scored is dropped and counted, never scored zero.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle

from actors.supervision import INFRASTRUCTURE
from raylign.config import RewardConfig
from raylign.records import Trajectory
from raylign.rewards.scoring import Rejection, Scored, score_trajectories
from raylign.rewards.source import load_reward


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """A scored group, and when and where."""

    scored: Scored
    worker: str
    start: float
    end: float


_WEIGHTS = {"correct": 1.0, "format": 0.1}


class RewardWorker:
    """One reward function behind a Ray actor."""

    def __init__(self, name: str, source: str, weights: Mapping[str, float]) -> None:
        self._name, self._weights = name, dict(weights)
        self._function = load_reward(source)

    def score(self, trajectories: tuple[Trajectory, ...], references: dict[str, str]) -> Scores:
        """Rewards of `trajectories`; `references` maps prompt ids to right answers."""
        start = time.time()
        scored = score_trajectories(trajectories, references, self._function, self._weights)
        return Scores(scored, self._name, start, time.time())


class RewardPool:
    """The reward workers of a run, used in turn."""

    def __init__(self, config: RewardConfig, spawn: Callable[[str], ActorHandle]) -> None:
        self._config, self._spawn = config, spawn
        self._workers = {f"reward-{i}": spawn(f"reward-{i}") for i in range(config.count)}
        self._turn = 0

    async def score(
        self, trajectories: tuple[Trajectory, ...], references: dict[str, str]
    ) -> Scores:
        """Score one group; twice lost to a dead or silent worker, it is rejected as such."""
        start, reason = time.time(), ""
        for _ in range(2):
            names = list(self._workers)
            name = names[self._turn % len(names)]
            self._turn += 1
            try:
                return await asyncio.wait_for(
                    self._workers[name].score.remote(trajectories, references),
                    self._config.timeout_s,
                )
            except INFRASTRUCTURE as error:
                reason = (
                    f"reward worker {'timed out' if isinstance(error, TimeoutError) else 'died'}"
                )
                ray.kill(self._workers[name])
                self._workers[name] = self._spawn(name)
        lost = [Rejection(t.prompt_id, t.group_id, reason) for t in trajectories]
        return Scores(Scored(kept=[], rejected=lost), "reward", start, time.time())

    def stop(self) -> None:
        """Kill all workers."""
        for worker in self._workers.values():
            ray.kill(worker)
        self._workers.clear()


def spawn_reward_worker(name: str, options: dict[str, object], config: RewardConfig) -> ActorHandle:
    """Start a `RewardWorker` actor with the given Ray resources."""
    return (
        ray.remote(RewardWorker)
        .options(**options)
        .remote(name, config.source, config.weights or _WEIGHTS)
    )
