"""Calls that all ranks of a group must answer, and who is to blame when one does not.

Ranks meet in collectives, so one that dies or hangs takes the others with it, and they are heard
first: with a connection that broke, or a wait that took too long. Those are echoes. Who died, or
says nothing while the others complain, is the cause.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ray.exceptions import RayActorError, RayError, RayTaskError, WorkerCrashedError

# What a rank says when it is another one that failed.
_BROKEN = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
)
_LATE = ("Timed out", "timed out", "Timeout(ms)", "timeout")
# How long others are listened to after the first complaint of a kind.
_AFTER_BROKEN_S, _AFTER_LATE_S, _AFTER_OTHER_S = 10.0, 3.0, 0.2
_PING_S = 1.0
_INFRASTRUCTURE = (RayActorError, WorkerCrashedError, OSError, torch.AcceleratorError)

Ping = Callable[[int], Any]
"""A reference to what a rank answers at once, however busy it is."""


class LearnerLost(RuntimeError):
    """The group cannot go on: a rank died, hung, or missed its deadline."""

    def __init__(self, reason: str, rank: int) -> None:
        super().__init__(reason, rank)
        self.reason, self.rank = reason, rank

    def __str__(self) -> str:
        return f"learner rank {self.rank} {self.reason}"


async def ask_ranks(
    refs: Sequence[Any],
    what: str,
    deadline_s: float,
    ping: Ping | None = None,
    patience_s: float = 15.0,
) -> list[Any]:
    """What every rank answers; `what` they were asked for, in words.

    Raises `LearnerLost` that names the cause, and otherwise what a rank has raised, as it was
    raised there. With `ping`, a rank that does not answer it for `patience_s` is hung.
    """
    tasks = [asyncio.ensure_future(_wait_for(ref)) for ref in refs]
    watch = asyncio.ensure_future(_watch(tasks, ping, patience_s)) if ping else None
    waited = [*tasks, *([watch] if watch else [])]
    try:
        until = time.monotonic() + deadline_s
        while not all(task.done() for task in tasks) and not _find_errors(tasks):
            left = until - time.monotonic()
            if left <= 0 or (watch is not None and watch.done()):
                break
            await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if watch is not None and watch.done() and not _find_errors(tasks):
            raise LearnerLost(
                f"does not answer: its process is stopped, or its machine gone ({what})",
                watch.result(),
            )
        await _hear_others(tasks)
        _judge(tasks, what, deadline_s)
        return [task.result() for task in tasks]
    finally:
        for task in waited:
            task.cancel()


async def _wait_for(ref: Any) -> Any:
    return await ref


async def _watch(tasks: Sequence[asyncio.Task[Any]], ping: Ping, patience_s: float) -> int:
    """The rank that stops answering pings, as long as tasks are pending."""
    while True:
        await asyncio.sleep(_PING_S)
        pending = [rank for rank, task in enumerate(tasks) if not task.done()]
        answers = [asyncio.ensure_future(_wait_for(ping(rank))) for rank in pending]
        if not answers:
            continue
        _, silent = await asyncio.wait(answers, timeout=patience_s)
        for rank, answer in zip(pending, answers, strict=True):
            if answer in silent:
                answer.cancel()
                if not tasks[rank].done():
                    return rank
            else:
                answer.exception()  # a rank that died is heard of by its task


def _find_errors(tasks: Sequence[asyncio.Task[Any]]) -> dict[int, BaseException]:
    """By rank, what was raised there."""
    found: dict[int, BaseException] = {}
    for rank, task in enumerate(tasks):
        if task.done() and not task.cancelled():
            error = task.exception()
            if error is not None:
                found[rank] = error
    return found


async def _hear_others(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """After the first complaint, give the cause time to show."""
    first = time.monotonic()
    while errors := _find_errors(tasks):
        pending = [task for task in tasks if not task.done()]
        if not pending or any(_is_gone(error) for error in errors.values()):
            return
        kinds = {_classify(error) for error in errors.values()}
        patience = _AFTER_OTHER_S
        if kinds <= {"broken", "late"}:
            patience = _AFTER_BROKEN_S if "broken" in kinds else _AFTER_LATE_S
        left = first + patience - time.monotonic()
        if left <= 0:
            return
        await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)


def _judge(tasks: Sequence[asyncio.Task[Any]], what: str, deadline_s: float) -> None:
    """Raise what is to be said of those that failed, if any did."""
    errors = _find_errors(tasks)
    pending = [rank for rank, task in enumerate(tasks) if not task.done()]
    for rank, error in errors.items():
        if _is_gone(error):
            raise LearnerLost(f"died: {_describe(error)} ({what})", rank) from None
    for rank, error in errors.items():
        if _classify(error) == "own":
            cause = _unwrap(error)
            if isinstance(cause, _INFRASTRUCTURE):
                raise LearnerLost(f"failed: {_describe(cause)} ({what})", rank) from None
            raise cause
    if errors and pending:
        raise LearnerLost(f"hangs: the others waited for it in vain ({what})", pending[0])
    if errors:
        rank, error = next(iter(errors.items()))
        raise LearnerLost(f"lost the others: {_describe(error)} ({what})", rank)
    if pending:
        raise LearnerLost(f"did not {what} within {deadline_s:g} s", pending[0])


def _unwrap(error: BaseException) -> BaseException:
    """What was raised in the actor, with where it was raised."""
    cause = getattr(error, "cause", None)
    if isinstance(error, RayTaskError) and isinstance(cause, BaseException):
        cause.__cause__ = error
        return cause
    return error


def _describe(error: BaseException) -> str:
    lines = [line.strip() for line in str(_unwrap(error)).splitlines() if line.strip()]
    return f"{type(_unwrap(error)).__name__}: {lines[0] if lines else 'no reason given'}"


def _is_gone(error: BaseException) -> bool:
    return isinstance(error, RayActorError | WorkerCrashedError)


def _classify(error: BaseException) -> str:
    """broken, late: echoes; own: anything else."""
    cause = _unwrap(error)
    if not isinstance(cause, RuntimeError | OSError | RayError):
        return "own"
    text = str(cause)
    if any(sign in text for sign in _BROKEN):
        return "broken"
    collective = type(cause).__name__.startswith("Dist") or "gloo" in text or "NCCL" in text
    return "late" if collective and any(sign in text for sign in _LATE) else "own"
