"""How many rollout workers there should be, from who waited for whom."""

from __future__ import annotations

from raylign.config import ScalingConfig


class Balance:
    """Adds a worker where the learner waits for samples, removes one where workers are idle.

    Between the two bounds nothing changes, so it does not swing; one worker at a time, every few
    steps, since a newcomer needs some to show what it brings.
    """

    def __init__(self, config: ScalingConfig) -> None:
        self._config = config
        self._waited = self._idle = self._seconds = 0.0
        self._steps = 0

    def advise(self, workers: int, waited: float, idle: float, seconds: float) -> int:
        """How many workers there should be after a step of `seconds`, in which the learner waited
        so many seconds for samples, and no worker had anything to do for `idle` seconds."""
        config = self._config
        if config.policy == "fixed":
            return workers
        self._waited, self._idle = self._waited + waited, self._idle + idle
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        if self._steps < config.every_steps:
            return workers
        learner, rollouts = self._waited / self._seconds, self._idle / self._seconds
        self._waited = self._idle = self._seconds = 0.0
        self._steps = 0
        wanted = workers
        if learner > config.learner_waits:
            wanted += 1
        elif rollouts > config.rollouts_wait:
            wanted -= 1
        return min(max(wanted, config.least), config.most)
