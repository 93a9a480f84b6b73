"""Answers that are mathematics: expressions, sets, intervals, matrices, by math-verify and sympy.

They are compared in a process of their own, which is killed when an answer costs more time than any
honest one does: sympy can be made to compute without end, and a signal, which is how math-verify
limits itself, reaches only main threads. Time is counted as the process' own, so that a busy
machine changes no verdict.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from raylign.config import UserError
from raylign.rewards import frames
from raylign.rewards.frames import Channel, Gone
from raylign.rewards.outcomes import SourceFailure
from raylign.rewards.verifiers import find_answer

_SCRIPT = Path(__file__).with_name("algebra.py")
_LONGEST = 400
_MEMORY = 2 << 30
_START_S = 60.0
_TICK_S = 0.1
# Wall time that a comparison may take for each second of its own, before the machine is to blame.
_PATIENCE = 20.0


class MathVerifier:
    """`(completion, reference) -> {"correct", "format"}`, each 0 or 1.

    The answer stands in the last `\\boxed{}` or after the last `####`; of neither, `format` is 0
    and what stands between the last dollar signs, or after the last `answer is`, counts. A
    reference is read in the same way, and is all answer where nothing in it is marked. `correct` is
    1 if both are equal as mathematics. An answer that is longer than any answer, cannot be read, or
    cannot be compared within `seconds` of processor time, is wrong.

    Raises `ValueError` for a reference that is no mathematics, `SourceFailure` when the process was
    lost to something else, and at once `UserError` when math-verify is not installed.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "align.reward.source='math': math-verify is not installed; "
                "pip install 'math-verify>=0.9'"
            )
        if seconds <= 0:
            raise UserError(f"seconds={seconds} must be above 0")
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._golds: dict[str, str] = {}

    def __call__(self, completion: str, reference: str) -> dict[str, float]:
        gold = self._read_gold(reference)
        marked = find_answer(completion)
        said = (_find_unmarked(completion) if marked is None else marked).strip().strip("$ ")
        layout = float(marked is not None and bool(said))
        if not said or len(said) > _LONGEST:
            return {"correct": 0.0, "format": layout}
        right = said == gold or self._ask(("same", gold, said)) is True
        return {"correct": float(right), "format": layout}

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._drop()

    def _read_gold(self, reference: str) -> str:
        """The reference's answer, found readable once."""
        if reference not in self._golds:
            marked = find_answer(reference)
            gold = (reference if marked is None else marked).strip().strip("$ ")
            if not gold or len(gold) > _LONGEST or self._ask(("read", gold)) is not True:
                raise ValueError(f"reference {gold[:80]!r} cannot be read as mathematics")
            if len(self._golds) > 10_000:
                self._golds.clear()
            self._golds[reference] = gold
        return self._golds[reference]

    def _ask(self, question: tuple[str, ...]) -> bool | None:
        """The process' answer; None when it took too long, or did not survive the question."""
        with self._lock:
            if self._process is None:
                self._process = _Process()
            try:
                return bool(self._process.ask(question, self._seconds))
            except (Gone, TimeoutError):
                killed = self._process.ended() == -9
                self._drop()
                if killed:
                    raise SourceFailure(
                        "the process that compares mathematics was killed"
                    ) from None
                return None
            except SourceFailure:
                self._drop()
                raise

    def _drop(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None


class _Process:
    """`algebra.py`, and the pipes to it."""

    def __init__(self) -> None:
        to_read, to_write = os.pipe(), os.pipe()
        numbers = [str(to_read[0]), str(to_write[1])]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT), str(frames.__file__), *numbers, str(_MEMORY)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=(to_read[0], to_write[1]),
                start_new_session=True,
            )
        finally:
            os.close(to_read[0])
            os.close(to_write[1])
        self._channel = Channel(to_write[0], to_read[1])
        try:
            self._channel.receive(time.monotonic() + _START_S)
        except (Gone, TimeoutError) as error:
            self.end()
            raise SourceFailure(f"math-verify did not start: {error}") from None

    def ask(self, question: tuple[str, ...], seconds: float) -> Any:
        """Raises `Gone` when it died, `TimeoutError` when it used up its time, `SourceFailure` when
        the machine did not give it any."""
        budget = self._used() + seconds
        until = time.monotonic() + seconds * _PATIENCE
        self._channel.send(question, until)
        while True:
            try:
                return self._channel.receive(time.monotonic() + _TICK_S)
            except TimeoutError:
                if self._used() > budget:
                    raise
                if time.monotonic() > until:
                    raise SourceFailure("no processor time to compare mathematics") from None

    def ended(self) -> int | None:
        """Its status, when it is not we who end it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(0.05)
        return None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._channel.close()

    def _used(self) -> float:
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.NoSuchProcess:
            raise Gone("the process ended") from None
        return float(times.user + times.system)


def _find_unmarked(text: str) -> str:
    """What an answer without a mark probably is; empty when nothing looks like one."""
    tail = text[-2 * _LONGEST :]
    parts = tail.split("$")
    if len(parts) >= 3:
        return parts[-2]
    for phrase in ("answer is", "answer:"):
        _, found, rest = tail.lower().rpartition(phrase)
        if found:
            return tail[len(tail) - len(rest) :].split("\n", 1)[0].strip().rstrip(".")
    return ""
