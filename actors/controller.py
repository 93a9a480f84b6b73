"""The reinforcement learning loop.

    prompts -> rollout workers -> reward workers -> admit -> learner -> publish -+
                   ^                                                             |
                   +------------------- weights, version v+1 --------------------+

One loop for every staleness. The groups of step s are dispatched once version s - max_staleness is
proved on a worker, and to such workers alone; versions only grow, so no sample trained at step s is
more than `max_staleness` versions old, by construction. With 0, generation and learning take turns.
With 1 or more, the next steps' groups are generated while the learner learns, and weights change
under them in flight.

Nothing is lost on the way: every completion stands in the ledger, every batch is on disk before it
is learned from, and whoever goes on after a death, of a worker, a rank or this loop, begins where
it was.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.buffer import Admitted, Drop, Group, admit
from actors.dispatch import Dispatcher, PromptSource, Scorer
from actors.durable_learner import DurableLearner
from actors.journal import Journal
from actors.learner import LearnerReport
from actors.learner_rank import resolve_algorithm
from actors.ledger import LEDGER_FILE, NOTHING_SETTLED, Ledger, Totals
from actors.measurement import describe_left_out, measure_step, regroup
from actors.rollout_pool import RolloutPool
from actors.run_files import Branch, RunFiles, Start, next_branch
from actors.scaling import FleetScaling
from actors.supervision import explain_drought
from actors.weights import WeightManifest
from actors.wishes import grant_wishes
from raylign.algorithms.kl import AdaptiveKL
from raylign.config import AlignConfig, UserError
from raylign.training.batches import LearnerBatch
from raylign.training.engine import DivergenceError
from raylign.training.guards import Guard
from raylign.training.schedule import learning_rate

UNDONE = "rolled back"


@dataclass(frozen=True, slots=True)
class Crew:
    """The actors of a run."""

    rollouts: RolloutPool
    scorer: Scorer
    learner: DurableLearner


class Controller:
    """Runs `config.steps` steps, and leaves the policy in the stage's directory."""

    def __init__(
        self,
        config: AlignConfig,
        crew: Crew,
        source: PromptSource,
        journal: Journal,
        files: RunFiles,
    ) -> None:
        self._config, self._crew, self._source, self._journal = config, crew, source, journal
        self._files = files
        self._algorithm, coefficients = resolve_algorithm(config.algorithm)
        self._ledger = Ledger(files.stage / LEDGER_FILE)
        self._dispatcher = Dispatcher(
            config,
            crew.rollouts,
            crew.scorer,
            source,
            self._ledger,
            journal,
            files,
            replaces_idle_groups=self._algorithm.dynamic_sampling,
        )
        target, horizon = config.algorithm.kl_target, config.algorithm.kl_horizon
        self._kl_coef = coefficients.kl_coef
        self._kl = None if target is None else AdaptiveKL(coefficients.kl_coef, target, horizon)
        self._guard = Guard(config.guard)
        self._scaling = FleetScaling(config.scaling, config.rollout, crew.rollouts, journal)
        self._branch = Branch()
        self._step = self._told = 0
        self.summary: dict[str, Any] = {}
        """What the learner says of the policy that it left."""
        self._sync: asyncio.Task[None] | None = None
        self._sync_seconds = 0.0

    async def run(self) -> Totals:
        """Learn to the last step, going on from what an earlier attempt left.

        Returns what became of all completions. Raises `UserError` when not one sample of a step
        can be learned from or the policy has collapsed for good, `BudgetSpent` when too many
        workers failed.
        """
        start = await asyncio.to_thread(self._files.find_start)
        self._restore(start)
        self._crew.rollouts.begin()  # to load while the learner does
        manifest, again = await self._relearn(start)
        for batch, report in again:
            self._tell_again(batch, report)
        await self._crew.rollouts.start(manifest)
        pools = {"rollouts": self._scaling.scale, **self._crew.scorer.scalable}
        wishes = asyncio.create_task(grant_wishes(self._files.stage, pools, self._journal))
        # What was imported stays for good, and samples are freed by counting: with a collector that
        # looked at all of it every 700 objects, a tenth of this process's time would go there.
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        try:
            self._dispatcher.begin_at(self._step, self._branch)
            self._dispatcher.allow(self._step)
            while self._step < self._config.steps:
                await self._take_step()
                # Python 3.11's wait_for may swallow a cancellation, and with it a Ctrl-C.
                if (own := asyncio.current_task()) is not None and own.cancelling():
                    raise asyncio.CancelledError
            await self._settle()
            for event in await self._crew.learner.settle():
                self._journal.event(**event)
            self.summary = await self._crew.learner.export()
        finally:
            wishes.cancel()
            if self._sync is not None:
                self._sync.cancel()
            await self._dispatcher.cancel("in flight when the run ended")
            self._ledger.close()
            gc.unfreeze()  # libraries tell of what is still there at the end
        return self._ledger.totals

    def _restore(self, start: Start) -> None:
        """Books, coefficients and counters as they were after the last batch on disk."""
        self._branch, progress = start.branch, start.progress
        books = progress.get("ledger", NOTHING_SETTLED)
        undone = {UNDONE: start.branch.undone} if start.branch.undone else {}
        self._ledger.restore({**books, "dropped": {**books["dropped"], **undone}})
        if progress:
            self._set_kl(progress["kl_coef"])
            self._crew.scorer.restore(progress["scorer"])
        for batch in start.batches:
            self._book(batch, again=True)
            self._crew.scorer.restore(batch.record["scorer"])
        self._step = start.step + len(start.batches)
        if start.branch.attempt:
            self._files.settle_branch(start.branch)  # of a rollback that was interrupted
        self._told = min(self._step, self._journal.last_step + 1)
        self._journal.rewind(self._told)
        if self._step:
            self._journal.event(what="resumed", step=self._step, checkpoint=start.step)
        for event in start.events:
            self._journal.event(**event)

    async def _relearn(
        self, start: Start
    ) -> tuple[WeightManifest, list[tuple[LearnerBatch, LearnerReport]]]:
        """The learner as it was after the last batch on disk. Raises `UserError` when that one,
        which nobody may have learned from yet, has no gradient; it is forgotten."""
        try:
            return await self._crew.learner.start(start)
        except DivergenceError as error:
            self._files.batches.remove_from(start.batches[-1].step)
            raise UserError(f"align: {error}; it is forgotten, so run the same again") from None

    def _tell_again(self, batch: LearnerBatch, report: LearnerReport) -> None:
        """What an earlier attempt did not get to say of a step, and the coefficient after it."""
        groups = regroup(batch)
        self._set_kl(batch.settings["kl_coef"])
        version = batch.step + self._branch.shift
        metrics = measure_step(groups, batch.trajectories, report, version)
        self._adapt_kl(metrics.get("kl"), batch)
        if batch.step >= self._told:
            self._journal.rollouts(batch.step, version, groups, batch, report)
            self._journal.step(batch.step, metrics)

    async def _take_step(self) -> None:
        step, version = self._step, self._step + self._branch.shift
        started = time.time()
        if not self._dispatcher.has(step):
            await self._settle()  # it begins the step, or says why it cannot
        groups = await self._dispatcher.collect(step)
        collected = time.time()
        self._journal.event(actor="learner", what="wait", start=started, end=collected, step=step)
        admitted = self._admit(step, version, groups)
        batch = self._compose(step, admitted)
        await asyncio.to_thread(self._files.batches.write, batch)
        try:
            report = await self._crew.learner.update(batch)
        except DivergenceError as error:
            await self._roll_back(step, f"{error}; no rank has taken the step")
            return
        self._book(batch)
        self._dispatcher.finish(step)
        self._step += 1
        done = {"start": report.start, "end": report.end, "step": step, "version": version + 1}
        self._journal.event(actor="learner", what="learn", **done)
        await self._publish()
        metrics = self._measure(step, version, groups, admitted, report)
        self._adapt_kl(metrics.get("kl"), batch)
        metrics |= {"wait/trainer": collected - started, "step_seconds": time.time() - started}
        # In this order: a step that has metrics has its completions, too.
        self._journal.rollouts(step, version, groups, batch, report)
        self._journal.step(step, metrics)
        if await self._watch(step, metrics):
            await self._save()
            self._scaling.rebalance(metrics)

    async def _publish(self) -> None:
        """The new version goes to the rollout workers; with staleness, while learning goes on."""
        await self._settle()  # the version before this one; by now long proved
        manifest = await self._crew.learner.publish()
        self._sync = asyncio.create_task(self._distribute(manifest, self._step))
        if self._config.max_staleness == 0:
            await self._settle()

    async def _distribute(self, manifest: WeightManifest, step: int) -> None:
        """Bring the rollout workers to a version, then let them begin what it allows."""
        started = time.time()
        await self._crew.rollouts.publish(manifest)
        self._sync_seconds = time.time() - started
        self._dispatcher.allow(step)

    async def _settle(self) -> None:
        if self._sync is not None:
            await self._sync
            self._sync = None

    def _admit(self, step: int, version: int, groups: Sequence[Group]) -> Admitted:
        admitted = admit(
            groups,
            needs_groups=self._algorithm.needs_groups,
            version=version,
            max_staleness=self._config.max_staleness,
            needs_spread=self._algorithm.dynamic_sampling,
        )
        self._dispatcher.leave_out(step, admitted.left_out)
        if not admitted.trajectories:
            rejections = [rejection for _, rejection in admitted.left_out]
            why = explain_drought(rejections, self._config.judge)
            raise UserError(f"align step {step}: {why}")
        # Once a step, over all of it: what a reward becomes must not depend on who was first.
        settled = self._crew.scorer.settle(admitted.trajectories)
        return replace(admitted, trajectories=tuple(settled))

    def _compose(self, step: int, admitted: Admitted) -> LearnerBatch:
        """The batch of a step, with all that its update, and the books, are a function of."""
        config = self._config
        rate = learning_rate(step, config.steps, 1.0, **config.schedule.model_dump())
        rate *= self._branch.rate
        settings = {
            "lr": rate * config.optimizer.lr,
            "critic_lr": rate * config.critic.optimizer.lr,
            "kl_coef": self._kl_coef,
        }
        record = {
            "trained": admitted.trained,
            "drops": [[drop.request, drop.reason, drop.completions] for drop in admitted.drops],
            "left_out": describe_left_out(admitted.left_out),
            "scorer": self._crew.scorer.state(),
        }
        return LearnerBatch(step, admitted.trajectories, admitted.groups, settings, record)

    def _book(self, batch: LearnerBatch, again: bool = False) -> None:
        """Enter what became of a batch's completions; `again`: another attempt dispatched them."""
        trained: Mapping[str, int] = batch.record["trained"]
        drops = [Drop(*drop) for drop in batch.record["drops"]]
        if again:
            asked = dict(trained)
            for drop in drops:
                asked[drop.request] = asked.get(drop.request, 0) + drop.completions
            for request, count in asked.items():
                self._ledger.dispatch(request, batch.step, "", count)
        for request, count in trained.items():
            self._ledger.train(request, batch.step, count)
        for drop in drops:
            self._ledger.drop(drop.request, batch.step, drop.reason, drop.completions)

    def _measure(
        self,
        step: int,
        version: int,
        groups: Sequence[Group],
        admitted: Admitted,
        report: LearnerReport,
    ) -> dict[str, float]:
        metrics = measure_step(groups, admitted.trajectories, report, version)
        metrics |= {f"dropped/{reason}": n for reason, n in admitted.dropped.items()}
        totals = self._ledger.totals
        metrics |= {f"ledger/dropped/{reason}": n for reason, n in totals.dropped.items()}
        metrics |= self._crew.scorer.take_metrics()
        return metrics | {
            "ledger/dispatched": totals.dispatched,
            "ledger/trained": totals.trained,
            "ledger/in_flight": totals.in_flight,
            "ledger/dropped": sum(totals.dropped.values()),
            "kl_coef": self._kl_coef,
            "sync_seconds": self._sync_seconds,
            "wait/generator": self._crew.rollouts.take_idle_seconds(),
            "workers/rollout": len(self._crew.rollouts.names),
            "workers/learner": self._config.learner.count,
            "restarts/learner": self._crew.learner.restarts,
            "restarts/rollout": self._crew.rollouts.restarts,
        }

    def _adapt_kl(self, kl: float | None, batch: LearnerBatch) -> None:
        """The coefficient of the next step, from the KL of one that was learned."""
        if self._kl is not None and kl is not None:
            self._set_kl(self._kl.update(kl, len(batch.trajectories)))

    def _set_kl(self, coef: float) -> None:
        self._kl_coef = coef
        if self._kl is not None:
            target, horizon = self._config.algorithm.kl_target, self._config.algorithm.kl_horizon
            assert target is not None
            self._kl = AdaptiveKL(coef, target, horizon)

    async def _save(self) -> None:
        """A checkpoint when it is time for one; the batches it covers may then go."""
        if self._step % self._config.checkpoint_every or self._step == self._config.steps:
            return
        progress: dict[str, Any] = {
            "step": self._step,
            "ledger": self._ledger.settled(),
            "kl_coef": self._kl_coef,
            "scorer": self._crew.scorer.state(),
        }
        started = time.time()
        for event in await self._crew.learner.save(progress):
            self._journal.event(**event)
        self._files.forget_covered()
        self._journal.event(
            actor="learner", what="save", start=started, end=time.time(), step=self._step
        )

    async def _watch(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the policy is sound; else do what the recipe says of a collapse."""
        breach = self._guard.look(step, metrics)
        if breach is None:
            return True
        config = self._config.guard
        text = breach.describe(config.window)
        if config.action == "warn":
            self._journal.event(what="collapse", step=step, text=text, action="warn")
            self._guard.forget()
            return True
        await self._roll_back(breach.back_to, text)
        return False

    async def _roll_back(self, before: int, reason: str) -> None:
        """Back to the newest checkpoint made at or before a step. Raises `UserError` when that is
        not wanted, or was done too often."""
        config = self._config.guard
        kept = f"the policy before it is in {self._files.checkpoints}"
        if config.action != "rollback" or self._branch.attempt >= config.max_rollbacks:
            self._files.batches.remove_from(self._step)  # of one that cannot be learned from
            done = f" after {self._branch.attempt} rollbacks" if self._branch.attempt else ""
            self._journal.event(what="collapse", step=self._step, text=reason, action="stop")
            raise UserError(f"align stopped{done}: {reason}; {kept}; lower align.optimizer.lr")
        await self._settle()
        await self._dispatcher.cancel(UNDONE)
        target = self._files.last_good(before)
        undone = self._ledger.undo(self._files.settled_at(target), UNDONE, self._step)
        version = self._step + self._branch.shift
        self._branch = next_branch(self._branch, version, target, undone)
        self._journal.rewind(target, UNDONE)
        self._files.roll_back(target, self._branch)
        self._journal.event(
            what="collapse", step=self._step, text=reason, action="rollback", to=target
        )
        manifest = await self._crew.learner.roll_back(target, self._branch)
        self._files.settle_branch(self._branch)
        self._step = target
        self._guard.forget()
        await self._crew.rollouts.publish(manifest)
        self._crew.rollouts.take_idle_seconds()  # of the pause, which no step is to show
        self._dispatcher.begin_at(target, self._branch)
        self._dispatcher.allow(target)
