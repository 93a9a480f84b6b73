"""Where faults are tried: a tiny model, prompts, runs, and what is written down of each fault."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

from tests.faults.align_run import AlignRun, Finish


@dataclass(frozen=True)
class Outcome:
    """What a fault came to."""

    detected_s: float | None
    """From the fault until somebody said so; None where there is nothing to detect."""
    recovered_s: float | None
    """From the fault until work went on, or the run had ended as it should."""
    note: str
    """What was seen."""
    lost: int | None = None
    """Completions that nobody can account for; None where the run was to end without its books."""


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    number: str
    title: str
    expected: str


@dataclass(frozen=True)
class Trial:
    """Rows that are tried together: one run, to which one thing after another happens."""

    rows: tuple[Row, ...]
    cause: Callable[[Lab, list[Outcome]], int | None]
    """Enters the outcome of each row into the list; returns what was lost in all."""
    quick: bool = False
    """Part of every run of the tests."""

    @property
    def name(self) -> str:
        return self.cause.__name__


TRIALS: list[Trial] = []


def fault(
    number: str, title: str, expected: str, quick: bool = False
) -> Callable[[Callable[[Lab], Outcome]], Callable[[Lab], Outcome]]:
    """Enter a function into the table, which has a run of its own."""

    def enter(cause: Callable[[Lab], Outcome]) -> Callable[[Lab], Outcome]:
        @wraps(cause)
        def alone(lab: Lab, found: list[Outcome]) -> int | None:
            found.append(cause(lab))
            return found[0].lost

        TRIALS.append(Trial((Row(number, title, expected),), alone, quick))
        return cause

    return enter


def faults(
    *rows: tuple[str, str, str],
) -> Callable[
    [Callable[[Lab, list[Outcome]], int | None]], Callable[[Lab, list[Outcome]], int | None]
]:
    """Enter a function that tries several rows on one run: all of them must hold."""

    def enter(
        cause: Callable[[Lab, list[Outcome]], int | None],
    ) -> Callable[[Lab, list[Outcome]], int | None]:
        TRIALS.append(Trial(tuple(Row(*row) for row in rows), cause))
        return cause

    return enter


@dataclass
class Lab:
    """Makes runs, and cleans up after them."""

    root: Path
    model: Path
    backend: str = "vllm"
    """Of the rollout workers where they are what is tried."""
    prompts: Path = field(init=False)
    _made: int = 0
    _references: dict[tuple[str, ...], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompts = self.root / "prompts.jsonl"
        rows = ({"prompt": f"w{i} w{i * 7 % 50}", "reference": f"w{i}"} for i in range(24))
        self.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    @contextmanager
    def run(self, *settings: str, swift: bool = True) -> Iterator[AlignRun]:
        """A run directory; nothing of it is left running afterwards. `swift`: engines are not what
        is tried, so they may be such as start at once."""
        self._made += 1
        backend = f"rollout.backend={'transformers' if swift else self.backend}"
        place = self.root / f"run-{self._made}"
        run = AlignRun(place, self.model, self.prompts, backend, *settings)
        try:
            yield run
        finally:
            run.stop()

    def reference(self, *settings: str) -> str:
        """Final weights of a lockstep run with such settings that nothing happened to."""
        if settings not in self._references:
            with self.run(*settings) as run:
                run.hurry()
                end = run.start().finish()
                assert end.status == 0, end.output[-3000:]
                self._references[settings] = run.weights()
        return self._references[settings]


PACED = "reward.source=tests.faults.rewards:paced"
"""Steps take seconds, until the run is told to `hurry`."""

ALONE = ("rollout.count=1", "learner.count=1")
"""As few processes as a run can have."""


def since(start: float, row: dict[str, Any]) -> float:
    """Seconds from a moment to an event."""
    return max(0.0, float(row["time"]) - start)


def first_event(run: AlignRun, after: float, deadline_s: float, **wanted: Any) -> dict[str, Any]:
    """The first event with such fields after a moment; waits for it."""
    found: dict[str, Any] = run.wait(
        f"event {wanted}",
        lambda: next((row for row in run.events(**wanted) if row["time"] >= after), None),
        deadline_s,
    )
    return found


def end_well(run: AlignRun, start: float, deadline_s: float = 600.0) -> tuple[Finish, float]:
    """The run must end with its goal met, nothing left behind; seconds since the fault."""
    end = run.finish(deadline_s)
    seconds = time.time() - start
    assert end.status == 0, f"status {end.status}\n{end.output[-3000:]}"
    require_clean(run)
    return end, seconds


def require_clean(run: AlignRun, deadline_s: float = 20.0) -> None:
    """No process of the run is left a few seconds after its end."""
    end = time.monotonic() + deadline_s
    while left := run.left_behind():
        if time.monotonic() > end:
            raise AssertionError(f"left behind: {[' '.join(p.cmdline())[:80] for p in left]}")
        time.sleep(0.2)


def hang(run: AlignRun, role: str, index: int = 0) -> float:
    """Stop a process of a role, as if its machine had frozen."""
    return run.kill([run.processes(role)[index]], signal.SIGSTOP)
