"""Of all that complain, the one that is to blame is named, and soon."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from actors.ranks import LearnerLost, ask_ranks
from raylign.config import UserError

CLOSED = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:29114"
LATE = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation"
Answer = tuple[float, Any]
"""Seconds, and what comes then: an error is raised; None never comes."""


def raised(error: Exception) -> Exception:
    """As Ray hands over what an actor raised."""
    return RayTaskError("update", "Traceback ...", error).as_instanceof_cause()


def died() -> RayActorError:
    return RayActorError(None)


def ask(
    *answers: Answer, deadline_s: float = 20.0, ping: Callable[[int], Any] | None = None
) -> tuple[Any, float]:
    """What `ask_ranks` gives or raises, and after how long."""

    async def run() -> Any:
        async def answer(after: float, what: Any) -> Any:
            await asyncio.sleep(1000 if what is None else after)
            if isinstance(what, Exception):
                raise what
            return what

        refs = [answer(*each) for each in answers]
        watched = None if ping is None else lambda rank: asyncio.ensure_future(ping(rank))
        return await ask_ranks(refs, "update", deadline_s, watched, 0.5)

    started = time.monotonic()
    try:
        return asyncio.run(run()), time.monotonic() - started
    except Exception as error:
        return error, time.monotonic() - started


def test_answers_come_in_the_order_of_ranks() -> None:
    assert ask((0.05, "a"), (0.0, "b"))[0] == ["a", "b"]


def test_the_dead_is_named_before_those_that_lost_it() -> None:
    echo = raised(RuntimeError(CLOSED))
    error, seconds = ask((0.0, echo), (0.0, echo), (0.5, died()), (0.0, None))
    assert isinstance(error, LearnerLost) and error.rank == 2 and seconds < 2
    assert str(error).startswith("learner rank 2 died")


def test_whoever_is_silent_while_others_time_out_hangs() -> None:
    echo = raised(RuntimeError(LATE))
    error, seconds = ask((0.0, echo), (0.0, None), (0.3, echo))
    assert isinstance(error, LearnerLost) and error.rank == 1 and seconds < 5
    assert "hangs" in str(error)


def test_an_error_of_its_own_comes_before_echoes() -> None:
    echo = raised(RuntimeError(CLOSED))
    error, _ = ask((0.0, echo), (0.2, raised(OSError(28, "No space left on device"))))
    assert isinstance(error, LearnerLost) and error.rank == 1 and "No space left" in str(error)


@pytest.mark.parametrize("mistake", [UserError("one line"), ValueError("a defect")])
def test_what_is_no_fault_of_the_machines_is_raised_as_it_was(mistake: Exception) -> None:
    error, seconds = ask((0.0, raised(mistake)), (0.0, None))
    assert type(error) is type(mistake) and str(error) == str(mistake)
    assert seconds < 2  # the others wait in collectives; nobody waits for them


def test_nobody_waits_beyond_the_deadline() -> None:
    error, seconds = ask((0.0, "a"), (0.0, None), deadline_s=0.3)
    assert isinstance(error, LearnerLost) and error.rank == 1 and seconds < 2
    assert str(error) == "learner rank 1 did not update within 0.3 s"


def test_all_that_lost_each_other_are_lost() -> None:
    echo = raised(RuntimeError(CLOSED))
    error, _ = ask((0.0, echo), (0.0, echo))
    assert isinstance(error, LearnerLost) and "lost the others" in str(error)


def test_a_rank_that_answers_no_ping_hangs_before_anyone_times_out() -> None:
    async def ping(rank: int) -> None:
        await asyncio.sleep(1000 if rank == 1 else 0)

    error, seconds = ask((0.0, None), (0.0, None), ping=ping)
    assert isinstance(error, LearnerLost) and error.rank == 1 and seconds < 4
    assert "does not answer" in str(error)


def test_a_rank_that_is_slow_and_answers_is_waited_for() -> None:
    async def ping(rank: int) -> None:
        return None

    assert ask((2.5, "late"), (0.0, "early"), ping=ping)[0] == ["late", "early"]
