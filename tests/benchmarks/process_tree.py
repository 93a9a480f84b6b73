"""CPU seconds and memory of a command and of everything it starts (Linux).

Processes are sampled through /proc. Memory is the sum of *proportional* set sizes: a page that
several processes map, such as Ray's object store, counts once. Processes that outlive their parent
become children of this one and go on being counted.
"""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.2
_SET_CHILD_SUBREAPER = 36  # prctl(2)
_TICKS = os.sysconf("SC_CLK_TCK")
_AFTERWARDS = 20.0
"""Seconds that daemons have to end after the command."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a command used."""

    returncode: int
    output: str
    """Standard output; standard error went where `errors` said."""
    wall_seconds: float
    cpu_seconds: float
    """User and system time of all processes; a process that lived for less than `INTERVAL` counts
    only if its parent waited for it."""
    peak_bytes: int
    """Largest sum of proportional set sizes that was seen."""
    others: float
    """Share of the machine's CPUs that other processes used meanwhile."""


def measure(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    errors: Path | None = None,
) -> Usage:
    """Run a command to its end and account for its whole process tree."""
    ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    started, busy, own = time.monotonic(), _busy_seconds(), _self_seconds()
    waited = _waited_seconds()
    log = (errors or Path(os.devnull)).open("wb")
    scratch = os.memfd_create("output")
    # A file, not a pipe: nobody reads while the command runs.
    with log, os.fdopen(scratch, "r+b") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=log, env=environment, cwd=directory
        )
        seconds: dict[tuple[int, int], float] = {}
        peak = 0
        while process.poll() is None:
            peak = max(peak, _sample(seconds))
            time.sleep(INTERVAL)
        wall = time.monotonic() - started
        _end_rest(seconds)
        output.seek(0)
        text = output.read().decode(errors="replace")
    cpu = max(sum(seconds.values()), _waited_seconds() - waited)
    elapsed = time.monotonic() - started
    foreign = _busy_seconds() - busy - cpu - (_self_seconds() - own)
    others = max(0.0, foreign / elapsed / (os.cpu_count() or 1))
    return Usage(process.returncode, text, wall, cpu, peak, others)


def _end_rest(seconds: dict[tuple[int, int], float]) -> None:
    """Account for processes that are still ending, and take in the dead."""
    limit = time.monotonic() + _AFTERWARDS
    while time.monotonic() < limit:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        _sample(seconds)
        time.sleep(INTERVAL)


def _sample(seconds: dict[tuple[int, int], float]) -> int:
    """Update the CPU seconds of each (process, start); returns the bytes that all use now."""
    children: dict[int, list[int]] = {}
    states: dict[int, tuple[int, float]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            text = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it has ended
            continue
        fields = text[text.rindex(")") + 2 :].split()
        children.setdefault(int(fields[1]), []).append(int(entry))
        used = (int(fields[11]) + int(fields[12])) / _TICKS
        states[int(entry)] = int(fields[19]), used
    total, waiting = 0, children.get(os.getpid(), [])
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        start, used = states[process]
        seconds[process, start] = max(seconds.get((process, start), 0.0), used)
        total += _proportional_bytes(process)
    return total


def _proportional_bytes(process: int) -> int:
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:  # it has ended
        pass
    return 0


def _busy_seconds() -> float:
    """CPU seconds of the whole machine so far, waiting left out."""
    with open("/proc/stat", encoding="ascii") as file:
        fields = [int(field) for field in file.readline().split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / _TICKS


def _self_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _waited_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
