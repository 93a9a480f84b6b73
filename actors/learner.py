"""The learner group: ranks that update the policy together and publish its versions.

What a rank loses, all of them lose: one that died or hung ends the group, which starts again from a
checkpoint. Who calls applies the steps since then once more, and has the same policy to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.broadcast import Loss
from actors.learner_rank import Diverged, LearnerTask, LearnerWorker, resolve_algorithm
from actors.processes import Process, end_process
from actors.ranks import LearnerLost, ask_ranks
from actors.weights import WeightManifest
from raylign.algorithms.online_preference import select_pairs
from raylign.config import AlignConfig
from raylign.records import Trajectory
from raylign.tracking import Metric, merge
from raylign.training.batches import LearnerBatch
from raylign.training.checkpoints import Event
from raylign.training.diverged import keep_batch
from raylign.training.engine import DivergenceError
from raylign.training.minibatches import Cut, share_out
from raylign.training.policy import Rates, Whole

log = logging.getLogger(__name__)

CANARY_SEQUENCES = 4
_PATIENCE_S = 15.0  # for an answer to a ping

Spawn = Callable[[int], ActorHandle]


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What one update is a function of, besides the version it begins at."""

    trajectories: tuple[Trajectory, ...]
    groups: tuple[int, ...]
    """Group number of each."""
    lr: float
    critic_lr: float = 0.0
    kl_coef: float | None = None
    """The algorithm's own when not given."""


@dataclass(frozen=True, slots=True, eq=False)
class LearnerReport:
    """What one update measured."""

    metrics: dict[str, Metric]
    mismatch_max: float
    advantages: tuple[float, ...]
    """Of each trajectory, the mean over its trained tokens; NaN where it was not learned from."""
    gaps: dict[int, np.ndarray]
    """float32 [T] of the trajectories of the mismatch sample: learner's minus rollout worker's
    log-prob at the version that sampled the token, NaN where that is not known."""
    start: float
    end: float
    token_advantages: dict[int, np.ndarray] = field(default_factory=dict)
    """float32 [T] of some trajectories whose tokens do not all have the same."""
    lost: tuple[Loss, ...] = ()
    """Workers that a broadcast of weights went on without, since the last update."""


class LearnerGroup:
    """All ranks, addressed as one. The policy version advances here and nowhere else.

    Every call has a deadline, and raises `LearnerLost`, with the rank that is the cause, when the
    group cannot go on; `restart` is then the only way.
    """

    def __init__(
        self, config: AlignConfig, spawn: Spawn, *, seed: int = 0, kept: Path | None = None
    ) -> None:
        """spawn: makes the actor of a rank, with nothing to be waited for. seed: of minibatches.
        kept: where batches that diverged are put."""
        self._config, self._spawn, self._seed, self._kept = config, spawn, seed, kept
        self._algorithm, _ = resolve_algorithm(config.algorithm)
        self._canary: tuple[tuple[int, ...], ...] = ()
        self._workers: list[ActorHandle] = []
        self.processes: dict[int, Process] = {}
        self.version = 0

    async def start(
        self,
        canary: Sequence[tuple[int, ...]],
        checkpoint: Path | None = None,
        version: int | None = None,
    ) -> WeightManifest:
        """Spawn and join the ranks, go on from a checkpoint if there is one, and publish.

        canary: sequences to prove syncs with. version: what the policy is called from here on, for
        one that was rolled back; versions of workers only grow. Raises `UserError` for a checkpoint
        that is damaged or of another model.
        """
        self._canary = tuple(canary[:CANARY_SEQUENCES])
        self._workers = [self._spawn(rank) for rank in range(self._config.learner.count)]
        deadline = self._config.learner.start_deadline_s
        places = await self._ask("place", deadline_s=deadline)
        self.processes = {rank: process for rank, (process, _) in enumerate(places)}
        address = places[0][1]
        asked = (address, checkpoint, version)
        [self.version, *_] = await self._ask("start", *asked, deadline_s=deadline)
        return await self.publish()

    async def restart(self, checkpoint: Path | None, version: int | None = None) -> WeightManifest:
        """End all ranks, and start others from a checkpoint, or from the beginning; see `start`."""
        self.stop()
        return await self.start(self._canary, checkpoint, version)

    async def update(self, step: Step) -> LearnerReport:
        """One update on the whole batch, split over ranks, minibatches and micro-batches.

        Raises `DivergenceError` when a gradient was no number: that optimizer step was taken by no
        rank, but ones before it may have been, so the group must be restarted.
        """
        tasks = self._deal(step)
        reports = await self._ask("update", each=tasks)
        if isinstance(reports[0], Diverged):
            self._refuse(step, reports[0])
        self.version += 1
        learned = [report.learned for report in reports]
        by_row = {row: value for one in learned for row, value in one.advantages.items()}
        return LearnerReport(
            metrics=merge(one.metrics for one in learned),
            mismatch_max=max(one.mismatch_max for one in learned),
            advantages=tuple(by_row.get(row, float("nan")) for row in range(len(step.groups))),
            gaps={row: gap for one in learned for row, gap in sorted(one.gaps.items())},
            start=min(report.start for report in reports),
            end=max(report.end for report in reports),
            lost=reports[0].lost,
            token_advantages={
                row: each for one in learned for row, each in one.token_advantages.items()
            },
        )

    async def publish(self) -> WeightManifest:
        """The current version, ready to be taken."""
        [manifest, *_] = await self._ask("publish", self._canary)
        found: WeightManifest = manifest
        return found

    async def save(self, root: Path, progress: Mapping[str, Any]) -> list[Event]:
        """A checkpoint of the current version below `root`, `step-VERSION`, with `progress` (JSON)
        in its manifest. Asynchronous ones go on beside the next update. What became of saves since
        the last call: a failed one raises nothing."""
        [events, *_] = await self._ask("save", root, dict(progress))
        found: list[Event] = events
        return found

    async def settle(self) -> list[Event]:
        """Wait for a save in flight; what became of it."""
        [events, *_] = await self._ask("settle")
        found: list[Event] = events
        return found

    async def export(self, output: Path) -> dict[str, Any]:
        """Leave `model/` and, of an adapted policy, `adapter/` in `output`, as training stages do;
        what the summary says of it."""
        [summary, *_] = await self._ask("export", output)
        found: dict[str, Any] = summary
        return found

    def stop(self) -> None:
        """End all ranks, those that are stopped included."""
        for worker in self._workers:
            with suppress(RayError):
                ray.kill(worker)
        for process in self.processes.values():
            end_process(process)
        self._workers, self.processes = [], {}

    def _deal(self, step: Step) -> list[LearnerTask]:
        config = self._config
        rewards = [t.reward for t in step.trajectories]
        if any(reward is None for reward in rewards):
            raise ValueError("a trajectory without a reward cannot be learned from")
        totals = tuple(float(reward) for reward in rewards if reward is not None)
        pairs = None
        if self._algorithm.pairwise:
            pairs = select_pairs(torch.tensor(totals), torch.tensor(step.groups)).tolist()
        cut = Cut(
            ranks=len(self._workers),
            budget=config.learner.token_budget,
            passes=config.algorithm.updates_per_batch,
            minibatches=config.algorithm.minibatches,
            seed=self._seed,
        )
        lengths = [len(t.token_ids) for t in step.trajectories]
        whole = Whole(totals, step.groups, tuple(t.sampled_tokens for t in step.trajectories))
        rates = Rates(step.lr, step.critic_lr, step.kl_coef)
        return [
            LearnerTask(tuple(step.trajectories[row] for row in share.rows), share, whole, rates)
            for share in share_out(lengths, step.groups, cut, self.version, pairs)
        ]

    def _refuse(self, step: Step, diverged: Diverged) -> None:
        where = ""
        if self._kept is not None:
            numbers = {"lr": step.lr, "critic_lr": step.critic_lr}
            if step.kl_coef is not None:
                numbers["kl_coef"] = step.kl_coef
            batch = LearnerBatch(self.version, step.trajectories, step.groups, numbers)
            place = keep_batch(self._kept, batch, diverged.rows, diverged.reason)
            where = f"; its rows are in {place}"
        raise DivergenceError(f"{diverged.reason}{where}")

    async def _ask(
        self,
        method: str,
        *arguments: Any,
        each: Sequence[Any] | None = None,
        deadline_s: float | None = None,
    ) -> list[Any]:
        """All ranks' answers; `each`: an argument for each of them."""
        if not self._workers:
            raise LearnerLost("was not started, or has ended", 0)
        own = [(one,) for one in each] if each is not None else [()] * len(self._workers)
        refs = [
            getattr(worker, method).remote(*arguments, *more)
            for worker, more in zip(self._workers, own, strict=True)
        ]
        starting = method in ("place", "start")  # loading libraries lets no other thread run
        return await ask_ranks(
            refs,
            method,
            deadline_s or self._config.learner.deadline_s,
            None if starting else self._ping,
            min(_PATIENCE_S, self._config.engine.timeout_s),
        )

    def _ping(self, rank: int) -> Any:
        return self._workers[rank].ping.remote()


def spawn_learner_worker(
    rank: int,
    options: Mapping[str, Any],
    model: Path,
    config: AlignConfig,
    seed: int = 0,
    transport: str = "object_store",
) -> ActorHandle:
    """Start one rank's actor with the given Ray resources; the rest as `LearnerWorker`."""
    actor = ray.remote(concurrency_groups={"health": 1}, **options)(LearnerWorker)
    return actor.remote(rank, config.learner.count, model, config, seed, transport)
