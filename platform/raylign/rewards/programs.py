"""Completions that are programs, held to unit tests.

The candidate runs in a sandbox and is asked for values; it never holds what they are compared with,
so whatever it does to its own process (exit, other builtins, an `__eq__` that always agrees, lines
that look like a verdict) it gains nothing. Tests that are more than a comparison run in a second
sandbox, which never sees a line of the candidate's code and calls its functions from afar. What
passes between the two is plain data. So a function that is tested by what it does to its arguments,
or that returns objects of its own or iterators, cannot be tested this way and fails; a completion
that answers from knowledge of the tests passes, as it would anywhere.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from raylign.config import SandboxConfig
from raylign.rewards.exams import Exam, read_exam
from raylign.rewards.frames import Gone
from raylign.rewards.sandbox import Guest, Sandbox

_FENCE = re.compile(r"^```[ \t]*([\w+-]*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LONGEST = 1 << 18


class CodeVerifier:
    """`(completion, reference) -> {"correct": 0 or 1, "passed": share of the tests}`.

    The program is the completion's last fenced block, or all of it. Raises `ValueError` for a
    reference that is no exam (`raylign.rewards.exams`), `SandboxFailure` when the sandbox broke:
    neither says anything about the completion.
    """

    def __init__(
        self, config: SandboxConfig, packages: bool = False, tolerance: float = 1e-6
    ) -> None:
        self._sandbox = Sandbox(config, packages)
        self._tolerance = tolerance

    def __call__(self, completion: str, reference: str) -> dict[str, float]:
        exam = read_exam(reference)
        source = extract_program(completion)
        if len(source) > _LONGEST or "\0" in source:
            return {"correct": 0.0, "passed": 0.0}
        source = f"{exam.prefix}\n{source}" if exam.prefix else source
        if exam.streams:
            passed = self._run_streams(exam, source)
        elif exam.calls:
            passed = self._run_calls(exam, source)
        else:
            passed = self._run_pieces(exam, source)
        return {"correct": float(passed == exam.count), "passed": passed / exam.count}

    def _run_streams(self, exam: Exam, source: str) -> int:
        left, passed = self._sandbox.config.seconds, 0
        for text, expected in exam.streams:
            with self._sandbox.start(streams=True) as guest, _forgive(guest):
                guest.await_walls()
                started = time.monotonic()
                output = guest.run(source, text, started + left)
                left -= time.monotonic() - started
                passed += output.status == 0 and _same_text(output.text, expected)
            if left <= 0:
                break
        return passed

    def _run_calls(self, exam: Exam, source: str) -> int:
        passed = 0
        with self._sandbox.start() as guest, _forgive(guest):
            guest.await_walls()
            until = time.monotonic() + self._sandbox.config.seconds
            guest.send(("candidate", source), until)
            if _hear(guest, until)[0] != "value":
                return 0
            for call in exam.calls:
                guest.send((call.name, call.arguments, dict(call.keywords)), until)
                kind, value = _hear(guest, until)
                if kind == "value" and call.exact:
                    passed += bool(value == call.expected)
                elif kind == "value":
                    passed += _agree(value, call.expected, self._tolerance)
        return passed

    def _run_pieces(self, exam: Exam, source: str) -> int:
        passed = 0
        with ExitStack() as stack:
            examiner = stack.enter_context(self._sandbox.start())
            guest = stack.enter_context(self._sandbox.start())
            stack.enter_context(_forgive(examiner, guest))
            examiner.trust()
            examiner.await_walls()
            guest.await_walls()
            until = time.monotonic() + self._sandbox.config.seconds
            guest.send(("candidate", source), until)
            if _hear(guest, until)[0] != "value":
                return 0
            talk = _Conversation(examiner, guest, until)
            if not talk.test(("examiner", exam.setup, dict(exam.names))) and not talk.calls:
                raise ValueError(f"reference's setup fails: {talk.reason}")
            for piece in exam.pieces:
                passed += talk.test(piece)
        return passed


class _Conversation:
    """Between the tests and what they test."""

    def __init__(self, examiner: Guest, guest: Guest, until: float) -> None:
        self._examiner, self._guest, self._until = examiner, guest, until
        self.calls = 0
        self.reason = ""

    def test(self, piece: Any) -> bool:
        """Have the examiner run `piece`; raises `Gone` when either of them ended."""
        self._examiner.send(piece, self._until)
        while True:
            kind, *content = self._examiner.receive(self._until)
            if kind != "call":
                break
            self.calls += 1
            self._guest.send(tuple(content), self._until)
            # Ended at `Gone`, so no test can pass that lost its candidate.
            self._examiner.send(_hear(self._guest, self._until), self._until)
        self.reason = content[0]
        if kind == "unusable":
            raise ValueError(f"reference cannot be used: {self.reason}")
        return bool(kind == "passed")


def extract_program(completion: str) -> str:
    """The last fenced block that is Python or names no language; all of it where there is none."""
    blocks = [
        text
        for language, text in _FENCE.findall(completion)
        if language.lower() in ("", "python", "py", "python3")
    ]
    return blocks[-1] if blocks else completion


@contextmanager
def _forgive(*guests: Guest) -> Iterator[None]:
    """A process that ended or took too long fails the tests that are left, and no more."""
    try:
        yield
    except Gone:
        for guest in guests:
            guest.linger()
    except TimeoutError:
        pass


def _hear(guest: Guest, until: float) -> tuple[str, Any]:
    """What the candidate reports: (`value`, it) or (`raised`, (class, message))."""
    match guest.receive(until):
        case ("value", value):
            return "value", value
        case ("raised", str(name), str(message)):
            return "raised", (name, message)
    raise Gone("it wrote what is no report")


def _agree(value: Any, expected: Any, tolerance: float) -> bool:
    """Equal as JSON: lists and tuples are the same, numbers to a relative `tolerance`."""
    if isinstance(expected, list):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(expected)
            and all(_agree(v, e, tolerance) for v, e in zip(value, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(value, dict)
            and {str(key) for key in value} == expected.keys()
            and all(_agree(v, expected[str(k)], tolerance) for k, v in value.items())
        )
    if isinstance(expected, float) and isinstance(value, int | float):
        try:
            return math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)
        except OverflowError:
            return False
    return (type(value) is type(expected) and bool(value == expected)) or (
        isinstance(expected, int) and isinstance(value, float) and value == expected
    )


def _same_text(text: str, expected: str) -> bool:
    """Equal but for blanks at the ends of lines and empty lines at the end."""

    def strip(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().splitlines()]

    return strip(text) == strip(expected)
