"""What the controller asks for rewards: reward workers and judges together, summed and shaped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from actors.placement import place_reward, require_room
from actors.reward import RewardPool, Scores, Span
from raylign.config import RewardConfig
from raylign.records import Prompt, Trajectory
from raylign.rewards.outcomes import Measured, Rejection, Scored, read_batch
from raylign.rewards.panel import ONLY, add_up
from raylign.rewards.scoring import rescale, shape
from raylign.rewards.shaping import RunningScale


class Judge(Protocol):
    """Judges as a source of rewards."""

    async def measure(
        self, trajectories: Sequence[Trajectory], prompt: Prompt
    ) -> list[float | Rejection]:
        """0 to 1 for each completion, in order, or why there is no verdict."""
        ...

    async def scale(self, count: int) -> str:
        """Have `count` workers; what was done, in words."""
        ...

    def take_metrics(self) -> dict[str, float]:
        """Of what happened since the last call."""
        ...

    def stop(self) -> None:
        """End them."""
        ...


class CompositeScorer:
    """Every source of a recipe as one; a completion that any of them cannot score is rejected.

    `longest` is the length of the longest completion, for overlong shaping. With `scale=running`
    totals are brought to scale by `settle`, once a step and in the order of its groups: what a
    reward becomes must not depend on which group was scored first.
    """

    def __init__(
        self,
        config: RewardConfig,
        longest: int,
        workers: RewardPool | None,
        judge: Judge | None = None,
    ) -> None:
        """`workers` is None when every source is a judge, `judge` when none is."""
        self._config, self._longest = config, longest
        self._workers, self._judge = workers, judge
        parts = config.parts
        self._judged = [name for name, part in parts.items() if part.source == "judge"]
        if config.source == "judge" and not parts:
            self._judged = [ONLY]
        self._only_judged = len(self._judged) == max(len(parts), 1)
        if (judge is None) == bool(self._judged) or (workers is None) != self._only_judged:
            raise ValueError("a judge is for judged sources, workers are for all others")
        self._scale = RunningScale()

    async def score(self, trajectories: tuple[Trajectory, ...], prompt: Prompt) -> Scores:
        """The reward of each completion of `prompt`, or why it has none.

        Raises `UserError` for sources that do not give what the recipe weighs, `BudgetSpent` when
        too many workers were lost.
        """
        start = time.time()
        if not trajectories:
            return Scores(Scored([], []), "reward", start, time.time())
        spans, measured = await self._measure(trajectories, prompt)
        scored = add_up(self._config, trajectories, measured)
        kept = shape(scored.kept, self._config.shaping, self._longest)
        return Scores(Scored(kept, scored.rejected), *spans[0], tuple(spans[1:]))

    def settle(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """A step's trajectories with their final totals; to be called once for each step."""
        settled, self._scale = rescale(trajectories, self._config.shaping, self._scale)
        return settled

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        return self._scale.to_dict()

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from what `state` gave."""
        self._scale = RunningScale.from_dict(state)

    @property
    def scalable(self) -> dict[str, Callable[[int], Coroutine[Any, Any, str]]]:
        """What changes the number of workers, by role."""
        found: dict[str, Callable[[int], Coroutine[Any, Any, str]]] = {}
        if self._workers is not None:
            found["rewards"] = self._scale_workers
        if self._judge is not None:
            found["judges"] = self._judge.scale
        return found

    def take_metrics(self) -> dict[str, float]:
        """Of workers and judge, since the last call."""
        found = {} if self._judge is None else self._judge.take_metrics()
        if self._workers is not None:
            found["workers/reward"] = float(self._workers.count)
            found["restarts/reward"] = float(len(self._workers.failures))
        return found

    def stop(self) -> None:
        """End all workers."""
        for pool in (self._workers, self._judge):
            if pool is not None:
                pool.stop()

    async def _scale_workers(self, count: int) -> str:
        assert self._workers is not None, "else nobody is told of it"
        more = count - self._workers.count
        if more > 0:
            require_room(place_reward(self._config), more, "align.reward")
        return await self._workers.scale(count)

    async def _measure(
        self, trajectories: tuple[Trajectory, ...], prompt: Prompt
    ) -> tuple[list[Span], dict[str, list[Measured]]]:
        """Who measured when, and what every source says; reward workers and judges at the same
        time."""
        tasks: list[asyncio.Task[tuple[Span, dict[str, list[Measured]]]]] = []
        if self._workers is not None:
            tasks.append(
                asyncio.create_task(self._ask_workers(self._workers, trajectories, prompt))
            )
        if self._judge is not None:
            tasks.append(asyncio.create_task(self._ask_judge(self._judge, trajectories, prompt)))
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # of those that are done, nothing
        measured: dict[str, list[Measured]] = {}
        for _, one in found:
            measured |= one
        return [span for span, _ in found], measured

    async def _ask_workers(
        self, workers: RewardPool, trajectories: tuple[Trajectory, ...], prompt: Prompt
    ) -> tuple[Span, dict[str, list[Measured]]]:
        found = await workers.measure(trajectories, prompt)
        return (found.worker, found.start, found.end), dict(found.measured)

    async def _ask_judge(
        self, judge: Judge, trajectories: Sequence[Trajectory], prompt: Prompt
    ) -> tuple[Span, dict[str, list[Measured]]]:
        start = time.time()
        verdicts = read_batch(trajectories, await judge.measure(trajectories, prompt), "judge")
        return ("judge", start, time.time()), {name: verdicts for name in self._judged}
