"""Processes of actors, known well enough to be ended: one that is stopped answers nobody, and what
asks it to leave asks in vain."""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylign.training.heartbeat import read_birth

log = logging.getLogger(__name__)
_KILL_S = 10.0
_GRACE_S = 0.5  # between `ray.kill` and a kill that Ray would report as a crash


@dataclass(frozen=True, slots=True)
class Process:
    """Where an actor lives."""

    pid: int
    born: str
    """When it began, in the system's own units: tells a reused pid."""
    node: str


def describe_process() -> Process:
    """The one that calls, which must be an actor."""
    pid = os.getpid()
    return Process(pid, read_birth(pid), ray.get_runtime_context().get_node_id())


def end_process(process: Process) -> None:
    """Kill it, stopped ones included, wherever it is; nothing when it is gone."""
    if process.node == ray.get_runtime_context().get_node_id():
        kill_here(process)
        return
    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
    ended = ray.remote(num_cpus=0)(kill_here).options(scheduling_strategy=there).remote(process)
    try:
        ray.get(ended, timeout=_KILL_S)
    except (RayError, GetTimeoutError):
        log.warning("node %s, where process %d was, does not answer", process.node, process.pid)


def kill_here(process: Process) -> None:
    """Kill a process of this machine that was told to leave, and does not."""
    end = time.monotonic() + _GRACE_S
    while read_birth(process.pid) == process.born and time.monotonic() < end:
        time.sleep(0.02)
    if read_birth(process.pid) == process.born:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
