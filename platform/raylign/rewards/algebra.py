"""Compares mathematical answers, in a process that may be killed: run as a script by `symbolic`.

math-verify reads LaTeX with a grammar and compares with sympy, neither of which can be stopped from
within or is bounded in time and memory. Its other reader, for plain expressions, goes through
Python's `eval` and is not used.
"""

from __future__ import annotations

import functools
import importlib
import resource
import runpy
import sys
import time
from typing import Any

_LONGEST_WAIT = 1e9
_ORPHAN_S = 120


@functools.lru_cache(maxsize=1024)
def read(text: str) -> tuple[Any, ...]:
    """What `text` says, as sympy; empty when nothing can be made of it."""
    library = importlib.import_module("math_verify")
    return tuple(
        library.parse(
            f"\\boxed{{{text}}}",
            extraction_config=[library.LatexExtractionConfig(boxed_match_priority=0)],
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
    )


def answer(question: tuple[str, ...]) -> bool:
    """(`read`, text): whether it can be read; (`same`, gold, text): whether they are equal."""
    kind, *texts = question
    sides = [list(read(text)) for text in texts]
    if kind == "read" or not all(sides):
        return all(sides)
    return bool(importlib.import_module("math_verify").verify(*sides, timeout_seconds=None))


def main() -> None:
    """`algebra.py FRAMES IN OUT MEMORY`: as `guest.py`, and the most bytes to take."""
    import logging

    logging.disable()  # that its own time limits are off is what we want
    frames = runpy.run_path(sys.argv[1])
    channel = frames["Channel"](int(sys.argv[2]), int(sys.argv[3]))
    most = int(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    importlib.import_module("math_verify")
    channel.send("ready", _LONGEST_WAIT)
    while True:
        try:
            question = channel.receive(_LONGEST_WAIT)
            # Long after the judge would have ended it: for when the judge is gone.
            soon = int(time.process_time()) + _ORPHAN_S
            resource.setrlimit(resource.RLIMIT_CPU, (soon, resource.RLIM_INFINITY))
            said = answer(question)
        except frames["Gone"]:
            return
        except (MemoryError, RecursionError, ArithmeticError, ValueError, TypeError):
            said = False
        channel.send(said, _LONGEST_WAIT)


if __name__ == "__main__":
    main()
