"""A learner group that outlives its ranks.

What is lost with a rank is the state since the newest checkpoint. The batches of those steps are on
disk: they are applied again, in order, and give the same weights to the bit, so that rollout
workers, samples and versions stay what they were.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from actors.journal import Journal
from actors.learner import LearnerGroup, LearnerReport, Step
from actors.processes import read_stacks
from actors.ranks import LearnerLost
from actors.run_files import Branch, RunFiles, Start
from actors.supervision import Budget
from actors.weights import WeightManifest
from raylign.training.batches import LearnerBatch
from raylign.training.checkpoints import Event

STACKS = "stacks"
"""Directory in the run's, of what ranks were at when their group was lost."""

T = TypeVar("T")
Begun = tuple[WeightManifest, list[tuple[LearnerBatch, LearnerReport]]]


class DurableLearner:
    """The learner group of a run, with its files."""

    def __init__(
        self,
        group: LearnerGroup,
        files: RunFiles,
        canary: Sequence[tuple[int, ...]],
        max_restarts: int,
        journal: Journal,
    ) -> None:
        """canary: sequences that every published version is proved with."""
        self._group, self._files, self._canary, self._journal = group, files, canary, journal
        self._budget = Budget("learner", max_restarts)
        self._step = 0
        self._shift = 0

    @property
    def version(self) -> int:
        """Of the policy that it holds."""
        return self._step + self._shift

    @property
    def restarts(self) -> int:
        """Groups that were lost so far."""
        return len(self._budget.reasons)

    async def start(self, start: Start) -> Begun:
        """Begin, or go on from a checkpoint and the batches after it: the version it then holds,
        and what each of the batches showed.

        Raises `BudgetSpent` when ranks are lost again and again.
        """
        self._shift = start.branch.shift
        self._step = start.step + len(start.batches)
        return await self._hold(self._begin, first=True)

    async def update(self, batch: LearnerBatch) -> LearnerReport:
        """Learn from a batch that is on disk."""
        assert batch.step == self._step, f"step {batch.step} follows {self._step}"
        report = await self._hold(lambda: self._group.update(as_step(batch)))
        self._step += 1
        for loss in report.lost:
            told = {"version": loss.version, "text": loss.reason}
            self._journal.event(actor=loss.worker, what="left_out", **told)
        return report

    async def publish(self) -> WeightManifest:
        """The current version, ready to be pulled."""
        start = time.time()
        manifest = await self._hold(self._group.publish)
        done = {"start": start, "end": time.time(), "version": manifest.version}
        self._journal.event(actor="learner", what="sync", **done)
        return manifest

    async def save(self, progress: Mapping[str, Any]) -> list[Event]:
        """A checkpoint of the current version; what became of those before."""
        root = self._files.checkpoints
        return await self._hold(lambda: self._group.save(root, progress))

    async def settle(self) -> list[Event]:
        """Wait for a checkpoint that is being written; what became of it."""
        return await self._hold(self._group.settle)

    async def export(self) -> dict[str, Any]:
        """Leave the policy as a model, and as an adapter if it is one; what the summary says."""
        return await self._hold(lambda: self._group.export(self._files.stage))

    async def roll_back(self, step: int, branch: Branch) -> WeightManifest:
        """Go back to the checkpoint of `step`; what follows has new versions."""
        self._step, self._shift = step, branch.shift
        manifest, _ = await self._hold(self._begin, first=True)
        return manifest

    def stop(self) -> None:
        """Kill all ranks."""
        self._group.stop()

    async def _hold(self, operation: Callable[[], Awaitable[T]], first: bool = False) -> T:
        """What `operation` gives, however many groups it takes; `first`: it begins one itself."""
        while True:
            try:
                return await operation()
            except LearnerLost as lost:
                self._journal.event(actor="learner", what="lost", text=str(lost), rank=lost.rank)
                await asyncio.to_thread(self._keep_stacks)
                self._budget.spend(str(lost))
            while not first:
                try:
                    await self._begin()
                    break
                except LearnerLost as lost:
                    self._budget.spend(str(lost))

    def _keep_stacks(self) -> None:
        """Write down what the ranks that are left of a lost group are at."""
        said = {rank: read_stacks(process) for rank, process in self._group.processes.items()}
        if any(said.values()):
            directory = self._files.stage.parent / STACKS
            directory.mkdir(exist_ok=True)
            file = directory / f"learner-{time.time():.0f}.txt"
            texts = (f"Rank {rank}\n\n{text or 'It is gone.'}\n" for rank, text in said.items())
            file.write_text("\n".join(texts), encoding="utf-8")
            self._journal.event(actor="learner", what="stacks", text=f"see {file}")

    async def _begin(self) -> Begun:
        """A new group with the state of the current step."""
        start = await asyncio.to_thread(self._files.find_start)
        missing = [batch for batch in start.batches if batch.step < self._step]
        assert start.step + len(missing) == self._step, "batches are kept until a checkpoint is"
        self._group.stop()
        version = start.step + self._shift
        manifest = await self._group.start(self._canary, start.checkpoint, version)
        reports = [(batch, await self._group.update(as_step(batch))) for batch in missing]
        self._journal.event(
            actor="learner",
            what="restored" if self.version or self.restarts else "started",
            step=self._step,
            version=self.version,
            checkpoint=start.step,
            repeated=len(missing),
        )
        return (await self._group.publish() if missing else manifest), reports


def as_step(batch: LearnerBatch) -> Step:
    """What the learner group makes an update from."""
    return Step(batch.trajectories, batch.groups, **batch.settings)
