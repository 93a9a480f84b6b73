"""Wishes of the user to a run that is going on, as files in its stage's directory.

Whoever sees the run's storage may ask, on a laptop as on a cluster, with no port open: a wish is a
file that appears whole, and its answer another. A run that is going on holds a lock on its
directory, so a wish to one that is not is refused at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from raylign.config import UserError
from raylign.run import write_json

CONTROL = ".control"
OPEN = "open.json"
"""Which attempt listens; of one that was killed it stays until the next one listens."""
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Wish:
    """How many workers there should be."""

    workers: Mapping[str, int]
    """By role: `rollouts`, `judges`, `rewards`."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a wish."""

    done: bool
    text: str


class ControlDesk:
    """The run's side."""

    def __init__(self, stage: Path) -> None:
        self._directory = stage / CONTROL
        self._directory.mkdir(parents=True, exist_ok=True)
        for file in self._directory.iterdir():  # of an earlier attempt: nobody waits for them
            file.unlink()
        write_json(self._directory / OPEN, {"id": uuid.uuid4().hex})

    def take(self) -> list[Wish]:
        """Wishes that have come in, oldest first; each is given once."""
        found = []
        for file in sorted(self._directory.glob("wish-*.json"), key=lambda f: f.stat().st_mtime):
            body = json.loads(file.read_text(encoding="utf-8"))
            file.unlink()
            found.append(Wish(**body))
        return found

    def answer(self, wish: Wish, answer: Answer) -> None:
        """Tell whoever waits."""
        write_json(self._directory / f"answer-{wish.id}.json", asdict(answer))


def ask(stage: Path, wish: Wish, deadline_s: float) -> Answer:
    """Put a wish to the run that makes `stage`, and wait for its answer; also for one that is still
    starting, or starts again meanwhile.

    Raises `UserError` when no run is making it, or it does not answer in time.
    """
    if not is_running(stage):
        raise UserError(f"no run is working on {stage}; start it, or give its run directory")
    asked = stage / CONTROL / f"wish-{wish.id}.json"
    answered = stage / CONTROL / f"answer-{wish.id}.json"
    end, told = time.monotonic() + deadline_s, None
    while time.monotonic() < end:
        if (listener := _find_listener(stage)) != told:
            write_json(asked, asdict(wish))
            told = listener
        if answered.is_file():
            found = Answer(**json.loads(answered.read_text(encoding="utf-8")))
            answered.unlink()
            return found
        if not is_running(stage):
            raise UserError(f"the run on {stage} ended before it answered")
        time.sleep(POLL_S)
    asked.unlink(missing_ok=True)
    raise UserError(
        f"the run on {stage} has not answered within {deadline_s:.0f} s; it may still be starting "
        "workers: look at its events.jsonl"
    )


def _find_listener(stage: Path) -> str | None:
    """The attempt that listens, or listened last."""
    try:
        found: str = json.loads((stage / CONTROL / OPEN).read_text(encoding="utf-8"))["id"]
    except FileNotFoundError:
        return None
    return found


def is_running(stage: Path) -> bool:
    """Whether a process is making `stage`."""
    try:
        descriptor = os.open(stage, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
