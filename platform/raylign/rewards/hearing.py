"""One question to a judge until it has a verdict: what is known already, attempts, budget.

A verdict that could not be read is asked for again, with another seed and told why; a call that
failed is made again after a pause that doubles. When neither helps there is silence, which is not a
mark. Every answer is kept as it comes, so what was paid for is not asked again after a restart.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raylign.config import JudgeConfig, UserError
from raylign.data.synthesis.answers import Answer, AnswerCache
from raylign.inference.endpoint import CallFailed, CallRefused, QuestionTooLong, Reply
from raylign.rewards.judging import JudgeTally
from raylign.rewards.rubric import remind
from raylign.rewards.verdicts import Unreadable, Verdict
from raylign.run import hash_json
from raylign.runtime import derive_seed

ABSTAINED = "judge abstained"
FAILED = "judge call failed"
REFUSED = "judge refused the question"
SPENT = "judge budget spent"
TOO_LONG = "too long for the judge"

_LONGEST_PAUSE_S = 30.0
_FAILURE = "call_failed"
_DIGITS = 32


class Asker(Protocol):
    """Answers one question; raises `CallFailed`, `CallRefused`, or `UserError`."""

    async def __call__(self, question: str, seed: int) -> Reply: ...


@dataclass(frozen=True, slots=True)
class Silence:
    """No verdict."""

    reason: str
    """One of few, to be counted."""
    detail: str = ""


Finding = Verdict | Silence


class Hearings:
    """All questions to one judge, at most so many at once. From one event loop."""

    def __init__(
        self,
        ask: Asker,
        config: JudgeConfig,
        directory: Path,
        identity: str,
        seed: int,
        tally: JudgeTally,
        pause_s: float = 0.5,
    ) -> None:
        """Answers are kept in `directory`, under the judge's `identity`; `pause_s` is the first
        pause after a failed call. Raises `UserError` for a directory that cannot be used."""
        self._ask, self._config, self._seed = ask, config, seed
        self._identity, self._tally, self._pause_s = identity, tally, pause_s
        self._cache = AnswerCache(directory)
        self._calls = len(self._cache)  # those of earlier attempts of this run too
        self._slots = asyncio.Semaphore(config.concurrency)
        self._open: dict[str, asyncio.Task[Finding]] = {}
        self._tasks: set[asyncio.Task[Finding]] = set()
        self.waiting = 0
        """Calls that have no answer yet."""

    async def hear(self, question: str, read: Callable[[str], Verdict], sample: int) -> Finding:
        """The verdict on `question`, as `read` finds it; `sample` of several independent ones.

        Whoever asks the same while it is being heard shares the finding. Raises `UserError` when
        nothing can be asked of this judge at all.
        """
        self._tally.verdicts += 1
        key = self._key(question, sample, 0)
        task = self._open.get(key)
        if task is None:
            task = asyncio.create_task(self._hear(question, read, sample))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            if self._config.cache:
                self._open[key] = task
                task.add_done_callback(lambda _: self._open.pop(key, None))
        else:
            self._tally.cache_hits += 1
        finding = await asyncio.shield(task)  # others may wait for it
        if isinstance(finding, Silence) or finding.value is None:
            self._tally.abstentions += 1
        return finding

    def stop(self) -> None:
        """Give up what is being heard, and close the files."""
        for task in list(self._tasks):
            task.cancel()
        self._cache.__exit__(None, None, None)

    async def _hear(self, question: str, read: Callable[[str], Verdict], sample: int) -> Finding:
        unread = failed = 0
        asked = question
        while True:
            key = self._key(question, sample, unread)
            answer = self._cache.get(key) if self._config.cache else None
            if answer is not None:
                self._tally.cache_hits += 1
            elif not self._charge():
                limit = self._config.max_calls
                return Silence(SPENT, f"judge.max_calls={limit}")
            else:
                try:
                    answer = await self._call(key, asked, derive_seed(self._seed, key))
                except CallRefused as error:
                    self._tally.refused += 1
                    too_long = isinstance(error, QuestionTooLong)
                    return Silence(TOO_LONG if too_long else REFUSED, str(error))
                except CallFailed as error:
                    failed += 1
                    if unread + failed > self._config.attempts:
                        return Silence(FAILED, str(error))
                    if error.wait_s > self._config.timeout_s:
                        asks = f"asks to wait {error.wait_s:g} s, judge.timeout_s is shorter"
                        return Silence(FAILED, f"{error}; {asks}")
                    self._tally.retries += 1
                    await asyncio.sleep(self._pause(failed, error.wait_s))
                    continue
            try:
                return read(answer.text)
            except Unreadable as error:
                unread += 1
                if unread + failed > self._config.attempts:
                    return Silence(ABSTAINED, f"no readable verdict: {error}")
                self._tally.retries += 1
                asked = remind(question, str(error))

    async def _call(self, key: str, question: str, seed: int) -> Answer:
        self.waiting += 1
        try:
            async with self._slots:
                self._tally.calls += 1
                start = time.monotonic()
                reply = await self._ask(question, seed)
                self._tally.answer(time.monotonic() - start)
        except (CallFailed, CallRefused):
            self._cache.put(uuid.uuid4().hex, Answer("", _FAILURE, 0, 0))  # for the budget
            raise
        finally:
            self.waiting -= 1
        answer = Answer(reply.text, reply.finish_reason, reply.tokens, 0)
        self._cache.put(key if self._config.cache else uuid.uuid4().hex, answer)
        return answer

    def _charge(self) -> bool:
        """Take one call off the budget, before it is made; whether there was one."""
        if self._config.max_calls is not None and self._calls >= self._config.max_calls:
            return False
        self._calls += 1
        return True

    def _pause(self, failed: int, wanted: float) -> float:
        """Doubles each time, and differs between calls, so that they do not all come back at once;
        never less than the service wants."""
        longest = min(self._pause_s * 2 ** (failed - 1), _LONGEST_PAUSE_S)
        return wanted + longest * random.uniform(0.5, 1.0)

    def _key(self, question: str, sample: int, attempt: int) -> str:
        config = self._config
        parts = [self._identity, config.temperature, config.max_tokens, question, sample, attempt]
        return hash_json(parts)[:_DIGITS]


def check_judge(config: JudgeConfig, group_size: int | None = None, stage: str = "align") -> None:
    """What can be known to be wrong with a judge of such groups before anything is started.

    Raises `UserError` naming the key, below `stage` of the recipe.
    """
    if config.samples > 1 and config.temperature == 0:
        raise UserError(
            f"{stage}.judge.samples={config.samples}: with temperature=0 every verdict is the "
            "same; set samples=1 or a temperature"
        )
    if not config.compare:
        idle = sorted(config.model_fields_set & {"both_orders", "pairs"})
        if idle:
            raise UserError(f"{stage}.judge.{idle[0]} has no effect without judge.compare=true")
    elif "scale" in config.model_fields_set:
        raise UserError(f"{stage}.judge.scale has no effect with judge.compare=true; leave it out")
    elif group_size is not None and group_size < 2:
        raise UserError(
            f"{stage}.judge.compare: group_size={group_size} leaves nothing to compare with; raise "
            f"{stage}.group_size, or set judge.compare=false"
        )
    elif group_size is not None and 0 < config.pairs * 2 < group_size:
        raise UserError(
            f"{stage}.judge.pairs={config.pairs} leaves some of {group_size} completions without a "
            f"pair; give at least {(group_size + 1) // 2}, or 0 for a circle"
        )
    if config.model is None:
        idle = sorted(config.model_fields_set & {"rollout", "most", "scale_queue"})
        if idle:
            raise UserError(f"{stage}.judge.{idle[0]} has no effect without judge.model")
    elif config.most < config.rollout.count:
        raise UserError(
            f"{stage}.judge.most={config.most} is fewer than judge.rollout.count="
            f"{config.rollout.count}; raise it"
        )
