"""The reinforcement learning loop.

    prompts -> rollout workers -> reward workers -> admit -> learner -> publish -+
                   ^                                                             |
                   +------------------- weights, version v+1 --------------------+

One loop for every staleness. The groups of step s are dispatched once version s - max_staleness is
proved on a worker, and to such workers alone; versions only grow, so no sample trained at step s is
more than `max_staleness` versions old, by construction. With 0, generation and learning take turns.
With 1 or more, the next steps' groups are generated while the learner learns, and weights change
under them in flight.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from actors.buffer import Admitted, Group, admit, count_staleness
from actors.learner import LearnerGroup, LearnerReport, resolve_algorithm
from actors.reward import RewardPool
from actors.rollout import RolloutPool
from actors.weights import SyncProof, WeightManifest
from raylign.algorithms.weighting import token_weights
from raylign.config import AlignConfig, UserError
from raylign.inference.generator import Sampling
from raylign.records import Prompt
from raylign.training.schedule import learning_rate


class Journal(Protocol):
    """Who hears of what happens."""

    def event(self, **fields: Any) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def examples(self, step: int, groups: Sequence[Group], version: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Crew:
    """The actors of a run."""

    rollouts: RolloutPool
    rewards: RewardPool
    learner: LearnerGroup


class Controller:
    """Runs `config.steps` steps over the prompts that `choose(step)` names."""

    def __init__(
        self,
        config: AlignConfig,
        crew: Crew,
        choose: Callable[[int], Sequence[Prompt]],
        journal: Journal,
        checkpoint: Callable[[int], Path],
    ) -> None:
        self._config, self._crew, self._choose, self._journal = config, crew, choose, journal
        self._checkpoint = checkpoint
        self._algorithm, _ = resolve_algorithm(config.algorithm)
        self._sampling = Sampling(**config.sampling.model_dump())
        self._groups: dict[int, list[asyncio.Task[Group]]] = {}
        self._dispatched = 0
        self._sync: asyncio.Task[None] | None = None
        self._sync_seconds = 0.0

    async def run(self) -> None:
        """Learn, and leave the final policy saved by `checkpoint`.

        Raises `UserError` when not one sample of a step can be learned from, `BudgetSpent` when
        too many workers failed.
        """
        manifest = await self._crew.learner.start([p.token_ids for p in self._choose(0)])
        await self._crew.rollouts.start(manifest)
        self._dispatch(manifest.version)
        try:
            for step in range(self._config.steps):
                await self._step(step)
            if self._sync is not None:
                await self._sync
        finally:
            for task in [t for tasks in self._groups.values() for t in tasks]:
                task.cancel()

    async def _step(self, step: int) -> None:
        started = time.time()
        groups = await self._collect(step)
        waited = time.time() - started
        self._journal.event(actor="learner", what="wait", start=started, end=time.time(), step=step)
        admitted = self._admit(step, groups)
        advantages, weights = self._weigh(admitted)
        report = await self._crew.learner.update(
            admitted.trajectories, advantages, weights, self._rate(step)
        )
        self._journal.event(
            actor="learner",
            what="learn",
            start=report.start,
            end=report.end,
            step=step,
            version=step + 1,
        )
        if self._sync is not None:
            await self._sync  # the version before this one; by now long proved
        manifest = await self._crew.learner.publish()
        self._sync = asyncio.create_task(self._distribute(manifest))
        if self._config.max_staleness == 0:
            await self._sync
        await self._save(step + 1)
        metrics = self._measure(step, groups, admitted, report)
        metrics |= {"wait/trainer": waited, "step_seconds": time.time() - started}
        self._journal.step(step, metrics)
        if step % self._config.examples_every == 0 or step == self._config.steps - 1:
            self._journal.examples(step, groups, step)

    def _dispatch(self, version: int) -> None:
        """Start the groups of every step that may begin at `version`."""
        allowed = min(self._config.steps, version + self._config.max_staleness + 1)
        while self._dispatched < allowed:
            step = self._dispatched
            self._groups[step] = [
                asyncio.create_task(self._make_group(step, number, prompt))
                for number, prompt in enumerate(self._choose(step))
            ]
            self._dispatched += 1

    async def _make_group(self, step: int, number: int, prompt: Prompt) -> Group:
        rollout = await self._crew.rollouts.generate(
            prompt,
            f"{step}/{number}",
            self._sampling,
            self._config.group_size,
            oldest=step - self._config.max_staleness,
        )
        self._journal.event(
            actor=rollout.worker, what="generate", start=rollout.start, end=rollout.end, step=step
        )
        scores = await self._crew.rewards.score(rollout.trajectories, {prompt.id: prompt.reference})
        self._journal.event(
            actor=scores.worker, what="score", start=scores.start, end=scores.end, step=step
        )
        return Group(tuple(scores.scored.kept), tuple(r.reason for r in scores.scored.rejected))

    async def _collect(self, step: int) -> list[Group]:
        while step not in self._groups:
            assert self._sync is not None
            await self._sync  # dispatches the step, or says why it cannot
        tasks = self._groups.pop(step)
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            raise

    async def _distribute(self, manifest: WeightManifest) -> None:
        """Bring the rollout workers to a version, then let them begin what it allows."""
        started = time.time()
        await self._crew.rollouts.publish(manifest)
        self._sync_seconds = time.time() - started
        self._dispatch(manifest.version)

    def _admit(self, step: int, groups: Sequence[Group]) -> Admitted:
        admitted = admit(
            groups,
            needs_groups=self._algorithm.needs_groups,
            version=step,
            max_staleness=self._config.max_staleness,
        )
        if not admitted.trajectories:
            reasons = ", ".join(f"{n} {reason}" for reason, n in admitted.dropped.items())
            raise UserError(
                f"align step {step}: no sample can be learned from ({reasons}); "
                f"check align.reward.source={self._config.reward.source!r}"
            )
        return admitted

    def _weigh(self, admitted: Admitted) -> tuple[list[float], list[float]]:
        """Advantage and loss weight of every trajectory, over the whole batch."""
        rewards = torch.tensor([t.reward for t in admitted.trajectories])
        advantages = self._algorithm.advantage(rewards, torch.tensor(admitted.groups))
        lengths = torch.tensor([t.sampled_tokens for t in admitted.trajectories])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        weights = token_weights(
            mask, self._algorithm.weighting, max_tokens=self._config.sampling.max_tokens
        )
        return advantages.tolist(), weights[:, 0].tolist()

    def _rate(self, step: int) -> float:
        config = self._config
        return learning_rate(
            step, config.steps, config.optimizer.lr, **config.schedule.model_dump()
        )

    async def _save(self, version: int) -> None:
        every = self._config.checkpoint_every
        if version == self._config.steps or (every and version % every == 0):
            await self._crew.learner.save(self._checkpoint(version))

    def _measure(
        self, step: int, groups: Sequence[Group], admitted: Admitted, report: LearnerReport
    ) -> dict[str, float]:
        learned = admitted.trajectories
        staleness, oldest = count_staleness(learned, step)
        metrics = {name: metric.mean for name, metric in report.metrics.items()}
        metrics |= {
            "reward/total": _mean([t.reward or 0.0 for t in learned]),
            "length": _mean([t.sampled_tokens for t in learned]),
            "truncated": _mean([t.finish_reason == "length" for t in learned]),
            "staleness/mean": staleness,
            "staleness/max": oldest,
            "groups/no_spread": _mean(
                [len({t.reward for t in g.trajectories}) < 2 for g in groups]
            ),
            "lr": self._rate(step),
            "learn_seconds": report.end - report.start,
            "sync_seconds": self._sync_seconds,
            "wait/generator": self._crew.rollouts.take_idle_seconds(),
            "samples": len(learned),
            "sampled_tokens": sum(t.sampled_tokens for t in learned),
        }
        if "mismatch/mean_abs" in report.metrics:
            metrics["mismatch/max_abs"] = report.mismatch_max
        for part in sorted({name for t in learned for name in t.reward_parts}):
            metrics[f"reward/{part}"] = _mean([t.reward_parts.get(part, 0.0) for t in learned])
        for reason, count in admitted.dropped.items():
            metrics[f"dropped/{reason}"] = count
        return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def note_sync(journal: Journal) -> Callable[[str, SyncProof], None]:
    """Tells `journal` of every proved weight sync."""

    def hear(worker: str, proof: SyncProof) -> None:
        journal.event(
            actor=worker,
            what="sync",
            start=proof.start,
            end=proof.end,
            version=proof.version,
            checksum=proof.checksum,
            canary_error=proof.canary_error,
        )

    return hear
