"""Processes of actors, known well enough to be asked what they are at, and to be ended: one that is
stopped, or stuck, answers nobody, and what asks it to leave asks in vain."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylign.training.heartbeat import read_birth

log = logging.getLogger(__name__)
_KILL_S = 10.0
_GRACE_S = 0.5  # between `ray.kill` and a kill that Ray would report as a crash
_STACKS_S = 2.0
_ASK = signal.SIGUSR2  # Ray, torch and vLLM leave it alone

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Process:
    """Where an actor lives."""

    pid: int
    born: str
    """When it began, in the system's own units: tells a reused pid."""
    node: str
    stacks: int
    """Descriptor of its own, of a file in memory: where it writes what its threads are at."""


def describe_process() -> Process:
    """The one that calls, which must be an actor. From now on it can be asked for its stacks."""
    pid = os.getpid()
    return Process(pid, read_birth(pid), ray.get_runtime_context().get_node_id(), record_stacks())


def record_stacks() -> int:
    """Have this process say what its threads are at whenever it is asked; see `Process.stacks`."""
    file = os.memfd_create("stacks")
    # Written by the signal's handler itself, whatever Python is at and whoever holds its lock.
    faulthandler.register(_ASK, file=file, all_threads=True)
    return file


def end_process(process: Process) -> None:
    """Kill it, stopped ones included, wherever it is; nothing when it is gone."""
    _do_there(kill_here, process)


def read_stacks(process: Process) -> str:
    """What each of its threads is at; wakes one that is stopped, so end it next. Empty when it is
    gone, or does not say."""
    return _do_there(read_stacks_here, process) or ""


def _do_there(work: Callable[[Process], T], process: Process) -> T | None:
    if process.node == ray.get_runtime_context().get_node_id():
        return work(process)
    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
    done = ray.remote(num_cpus=0)(work).options(scheduling_strategy=there).remote(process)
    try:
        found: T = ray.get(done, timeout=_KILL_S)
    except (RayError, GetTimeoutError):
        log.warning("node %s, where process %d was, does not answer", process.node, process.pid)
        return None
    return found


def read_stacks_here(process: Process) -> str:
    """Of a process of this machine."""
    said, end = b"", time.monotonic() + _STACKS_S
    try:
        if read_birth(process.pid) != process.born:
            return ""
        os.kill(process.pid, _ASK)
        os.kill(process.pid, signal.SIGCONT)
        while time.monotonic() < end:
            time.sleep(0.05)
            before, said = said, Path(f"/proc/{process.pid}/fd/{process.stacks}").read_bytes()
            if said and said == before:
                break
    except OSError:  # it ended meanwhile
        pass
    return said.decode(errors="replace")


def kill_here(process: Process) -> None:
    """Kill a process of this machine that was told to leave, and does not."""
    end = time.monotonic() + _GRACE_S
    while read_birth(process.pid) == process.born and time.monotonic() < end:
        time.sleep(0.02)
    if read_birth(process.pid) == process.born:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
