"""What counts as an infrastructure failure, and when to give up."""

from __future__ import annotations

import logging

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, WorkerCrashedError

log = logging.getLogger(__name__)

# A process or machine is gone or silent: the work is sound and is made again elsewhere. Anything
# else is the prompt's or the user's code's, and repeating it would not help.
INFRASTRUCTURE = (
    ActorDiedError,
    ActorUnavailableError,
    RayActorError,
    WorkerCrashedError,
    TimeoutError,
)


class BudgetSpent(RuntimeError):
    """More restarts were needed than the run allows."""


class Budget:
    """A number of restarts, each with its reason."""

    def __init__(self, what: str, limit: int) -> None:
        self._what, self._limit = what, limit
        self.reasons: list[str] = []

    def spend(self, reason: str) -> None:
        """Count one restart. Raises `BudgetSpent` with the first reason when none is left."""
        self.reasons.append(reason)
        log.warning("replacing %s", reason)
        if len(self.reasons) > self._limit:
            raise BudgetSpent(
                f"{len(self.reasons)} {self._what} failures, {self._limit} restarts allowed; "
                f"the first was {self.reasons[0]}"
            )
