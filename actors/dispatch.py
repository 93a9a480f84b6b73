"""Asks for every step's groups, has them scored, and gives them to the loop.

The groups of step s may begin once version s - max_staleness is proved on a worker. A step asks for
further prompts of its own when the algorithm cannot use groups without spread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from actors.buffer import Group
from actors.journal import Journal
from actors.ledger import Ledger
from actors.reward import Scores
from actors.rollout import Rollout, RolloutRequest
from actors.rollout_pool import RolloutPool
from actors.run_files import Branch, RunFiles
from actors.supervision import PromptLost
from raylign.config import AlignConfig
from raylign.inference.generator import Sampling
from raylign.records import Prompt, Trajectory
from raylign.rewards.outcomes import Rejection


class Scorer(Protocol):
    """Reward workers, judges, or several of them together."""

    async def score(self, trajectories: tuple[Trajectory, ...], prompt: Prompt) -> Scores:
        """What each completion of `prompt` is worth, or why it cannot be said."""
        ...

    def settle(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """A step's trajectories with their final totals; called once for each step."""
        ...

    def state(self) -> dict[str, Any]:
        """What scoring depends on beside the completions; JSON, for checkpoints."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after `state`."""
        ...

    @property
    def scalable(self) -> Mapping[str, Callable[[int], Any]]:
        """Pools whose size can be changed, by role."""
        ...

    def take_metrics(self) -> dict[str, float]:
        """What scoring shows of itself since the last call."""
        ...

    def stop(self) -> None:
        """End all workers."""
        ...


class PromptSource(Protocol):
    """Which prompts a step asks for: a function of its number, so that a step can be repeated."""

    def choose(self, step: int, again: int, count: int) -> Sequence[Prompt]:
        """`count` prompts of a step; `again` counts the rounds in which it asks for more."""
        ...

    def seed(self, request: str, attempt: int) -> int:
        """Of a request's completions; another after a rollback."""
        ...


class Dispatcher:
    """The steps that have been begun."""

    def __init__(
        self,
        config: AlignConfig,
        rollouts: RolloutPool,
        scorer: Scorer,
        source: PromptSource,
        ledger: Ledger,
        journal: Journal,
        files: RunFiles,
        *,
        replaces_idle_groups: bool,
    ) -> None:
        """`replaces_idle_groups`: the algorithm samples dynamically."""
        self._config, self._rollouts, self._scorer = config, rollouts, scorer
        self._source, self._ledger, self._journal, self._files = source, ledger, journal, files
        self._dynamic = replaces_idle_groups
        self._sampling = Sampling(**config.sampling.model_dump())
        self._steps: dict[int, asyncio.Task[list[Group]]] = {}
        self._made: dict[int, list[Group]] = {}
        """Groups of steps that are not learned from yet."""
        self._next = 0
        self._branch = Branch()

    def begin_at(self, step: int, branch: Branch) -> None:
        """The first step that is not yet done, and which seeds and versions follow."""
        self._next, self._branch = step, branch

    def allow(self, step: int) -> None:
        """The version that `step` is to be learned at is proved: begin that step, and those that
        may run ahead of it."""
        last = min(self._config.steps, step + self._config.max_staleness + 1)
        while self._next < last:
            oldest = self._next + self._branch.shift - self._config.max_staleness
            self._steps[self._next] = asyncio.create_task(self._make_step(self._next, oldest))
            self._next += 1

    def has(self, step: int) -> bool:
        """Whether a step was begun."""
        return step in self._steps

    async def collect(self, step: int) -> list[Group]:
        """The groups of a step that was allowed, in the order they were asked for."""
        return await self._steps.pop(step)

    def leave_out(self, step: int, left_out: Sequence[tuple[str, Rejection]]) -> None:
        """What of a step is not learned from, by request: should the step fail, that is known."""
        out: dict[str, list[Rejection]] = {}
        for request, rejection in left_out:
            out.setdefault(request, []).append(rejection)
        gone = {id(rejection.trajectory) for _, rejection in left_out}
        self._made[step] = [
            Group(
                tuple(t for t in group.trajectories if id(t) not in gone),
                tuple(out.get(group.request, ())),
                group.request,
            )
            for group in self._made.get(step, ())
        ]

    def finish(self, step: int) -> None:
        """A step is learned from, and its batch has all that is to be kept of its groups."""
        self._made.pop(step, None)
        self._files.drop_groups(step)

    async def cancel(self, reason: str) -> None:
        """Give up all that was begun; of what was made, and not learned from, the journal hears."""
        tasks = list(self._steps.values())
        self._steps.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for step, groups in sorted(self._made.items()):
            self._journal.unlearned(step, step + self._branch.shift, groups, reason)
        self._made.clear()

    async def _make_step(self, step: int, oldest: int) -> list[Group]:
        wanted = self._config.prompts_per_step
        rounds = self._config.algorithm.sampling_rounds if self._dynamic else 0
        groups: list[Group] = []
        for again in range(rounds + 1):
            missing = wanted - sum(group.spread for group in groups) if again else wanted
            if missing <= 0:
                break
            prompts = self._source.choose(step, again, missing)
            groups += await self._make_groups(step, len(groups), prompts, oldest)
        return groups

    async def _make_groups(
        self, step: int, first: int, prompts: Sequence[Prompt], oldest: int
    ) -> list[Group]:
        requests = []
        for number, prompt in enumerate(prompts, first):
            request = f"{step}/{number}"
            if self._branch.attempt:  # nothing of an earlier attempt is mistaken for its own
                request += f"/{self._branch.attempt}"
            self._ledger.dispatch(request, step, prompt.id, self._config.group_size)
            seed = self._source.seed(request, self._branch.attempt)
            sampling = replace(self._sampling, seed=seed)
            count = self._config.group_size
            requests.append(RolloutRequest(prompt, request, sampling, count, oldest))
        if self._config.max_staleness:
            waiting = [self._make_group(step, request) for request in requests]
        else:
            # In lockstep a step is made as a whole: it is the same, to the bit, every time.
            futures = self._rollouts.deal(requests)
            waiting = [
                self._score(step, request, future)
                for request, future in zip(requests, futures, strict=True)
            ]
        tasks = [asyncio.create_task(group) for group in waiting]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()  # of those that are done, nothing

    async def _make_group(self, step: int, request: RolloutRequest) -> Group:
        """A group that is found on disk, of an interrupted attempt, or asked for."""
        known = None
        if self._files.may_know(request.group):
            known = await asyncio.to_thread(self._files.take_group, request.group)
        if known is not None:
            self._made.setdefault(step, []).append(known)
            return known
        rollout = self._rollouts.generate(
            request.prompt, request.group, request.sampling, request.count, request.oldest
        )
        group = await self._score(step, request, rollout)
        if group.trajectories:  # one that a dead judge said nothing of is asked for again
            await asyncio.to_thread(self._files.keep_group, step, group)
        return group

    async def _score(
        self, step: int, request: RolloutRequest, waiting: Awaitable[Rollout]
    ) -> Group:
        try:
            rollout = await waiting
        except PromptLost as error:
            self._journal.event(what="prompt lost", step=step, text=str(error))
            return self._refuse(request, "prompt lost", str(error))
        except ValueError as error:  # the prompt's own fault
            self._journal.event(what="prompt refused", step=step, text=str(error))
            return self._refuse(request, "prompt refused", str(error))
        self._note("generate", rollout.worker, rollout.start, rollout.end, step)
        rejected = list(rollout.rejected)
        kept: tuple[Trajectory, ...] = ()
        if rollout.trajectories:
            scores = await self._scorer.score(rollout.trajectories, request.prompt)
            for span in ((scores.worker, scores.start, scores.end), *scores.others):
                self._note("score", *span, step)
            kept = tuple(scores.scored.kept)
            rejected += scores.scored.rejected
        missing = request.count - len(kept) - len(rejected)
        if missing:
            raise RuntimeError(f"{missing} completions of request {request.group} are missing")
        group = Group(kept, tuple(rejected), request.group)
        self._made.setdefault(step, []).append(group)
        return group

    def _refuse(self, request: RolloutRequest, reason: str, detail: str) -> Group:
        each = Rejection(request.prompt.id, request.group, reason, detail[:200])
        return Group((), (each,) * request.count, request.group)

    def _note(self, what: str, worker: str, start: float, end: float, step: int) -> None:
        self._journal.event(actor=worker, what=what, start=start, end=end, step=step)
