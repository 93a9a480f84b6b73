"""How many rollout workers there should be, from who waited for whom, or as the user says."""

from __future__ import annotations

from collections.abc import Mapping

from actors.journal import Journal
from actors.placement import place_rollout, require_room
from actors.rollout_pool import RolloutPool
from raylign.config import RolloutConfig, ScalingConfig, UserError


class Balance:
    """Adds a worker where the learner waits for samples, removes one where workers are idle.

    While no worker has anything to do, the learner waits for rewards or for weights on their way:
    such waiting is no reason for another one. Between the two bounds nothing changes, so it does
    not swing; one worker at a time, every few steps, since a newcomer needs some to show what it
    brings.
    """

    def __init__(self, config: ScalingConfig) -> None:
        self._config = config
        self._waited = self._idle = self._seconds = 0.0
        self._steps = 0

    def advise(self, workers: int, waited: float, idle: float, seconds: float) -> int:
        """How many workers there should be after a step of `seconds`, in which the learner waited
        so many seconds for samples, and no worker had anything to do for `idle` seconds."""
        config = self._config
        self._waited, self._idle = self._waited + waited, self._idle + idle
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        if self._steps < config.every_steps:
            return workers
        learner, rollouts = self._waited / self._seconds, self._idle / self._seconds
        self._waited = self._idle = self._seconds = 0.0
        self._steps = 0
        wanted = workers
        sampling = min(learner, 1.0 - rollouts)  # of what the learner waits for, at most
        if sampling > config.learner_waits and rollouts <= config.rollouts_wait:
            wanted += 1
        elif sampling <= config.learner_waits and rollouts > config.rollouts_wait:
            wanted -= 1
        return min(max(wanted, config.least), config.most)


class FleetScaling:
    """Changes how many rollout workers a run has, as its recipe, or the user, says."""

    def __init__(
        self, config: ScalingConfig, rollout: RolloutConfig, pool: RolloutPool, journal: Journal
    ) -> None:
        self._rollout, self._pool, self._journal = rollout, pool, journal
        self._balance: Balance | None = Balance(config) if config.policy == "balance" else None

    async def scale(self, count: int) -> str:
        """What the user wants, who overrules the policy from now on; what was done, in words.
        Raises `UserError`."""
        self._require_room(count)
        balance, self._balance = self._balance, None  # at once: newcomers take their time
        try:
            said = await self._pool.scale(count)
        except UserError:
            self._balance = balance
            raise
        if balance is not None:
            said += "; align.scaling.policy=balance no longer changes that"
        return said

    def rebalance(self, metrics: Mapping[str, float]) -> None:
        """Another number of workers, where the waiting of a step says so; the run goes on."""
        now = len(self._pool.names)
        if self._balance is None:
            return
        waited, idle = metrics["wait/trainer"], metrics["wait/generator"]
        wanted = self._balance.advise(now, waited, idle, metrics["step_seconds"])
        if wanted == now:
            return
        try:
            self._require_room(wanted)
        except UserError as error:
            self._journal.event(what="no room", role="rollouts", text=str(error))
            return
        self._journal.event(what="scale", role="rollouts", count=wanted, before=now)
        self._pool.scale_soon(wanted)

    def _require_room(self, count: int) -> None:
        more = count - len(self._pool.names)
        if more > 0:
            require_room(place_rollout(self._rollout), more, "align.rollout")
