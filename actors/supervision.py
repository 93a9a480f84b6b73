"""What counts as an infrastructure failure, and when to give up."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, WorkerCrashedError

from raylign.config import JudgeConfig
from raylign.rewards.outcomes import Rejection

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


class FleetExhausted(BudgetSpent):
    """No worker is left, and none may be started."""


class PromptLost(RuntimeError):
    """A request that lost one worker after another, and is likely what they died of."""

    def __init__(self, prompt: str, reasons: Sequence[str]) -> None:
        super().__init__(
            f"prompt {prompt} is set aside: {len(reasons)} workers were lost or late with it "
            f"({'; '.join(reasons)})"
        )
        self.prompt, self.reasons = prompt, tuple(reasons)


class Stalled(TimeoutError):
    """A worker that is there and gets nowhere."""


def describe(error: BaseException) -> str:
    """One line of what befell a worker; of an error inside of it, what it was there."""
    inner = getattr(error, "cause", None)
    error = inner if isinstance(inner, BaseException) else error
    lines = [line for line in str(error).splitlines() if line.strip()]
    if isinstance(error, TimeoutError):
        return lines[0] if lines else "no answer within its deadline"
    if not lines:
        return f"{type(error).__name__}: died"
    # Of an actor that could not be made, the last line is the error; of others the first one.
    return f"{type(error).__name__}: {lines[-1 if 'creation task' in lines[0] else 0].strip()}"


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


def explain_drought(left_out: Iterable[Rejection], judge: JudgeConfig) -> str:
    """Why a step has nothing to learn from, by reason with the first detail, and what to do."""
    counts: Counter[str] = Counter()
    details: dict[str, str] = {}
    for rejection in left_out:
        counts[rejection.reason] += 1
        details.setdefault(rejection.reason, rejection.detail)
    told = [
        f"{count} {reason}" + (f": {details[reason]}" if details[reason] else "")
        for reason, count in counts.most_common()
    ]
    advice = "check align.reward, and what it says of some completions in rollouts.jsonl"
    if counts and counts.most_common(1)[0][0].startswith("judge"):
        who = f"endpoint={judge.endpoint}" if judge.endpoint else f"model={judge.model}"
        advice = f"see to align.judge.{who}, and run the same again to go on"
    return f"no sample can be learned from ({'; '.join(told)}); {advice}"
