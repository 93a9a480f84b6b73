"""How much memory a process and all its descendants use."""

from __future__ import annotations

import threading

import psutil


def measure_memory(process: psutil.Process) -> int:
    """Bytes held by `process` and its descendants; memory that several share counts once (PSS)."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # ended between listing and looking
    return total


class MemoryMeter:
    """Samples this process tree's memory in a thread; `peak` is the largest seen, in bytes."""

    def __init__(self, every_s: float = 2.0) -> None:
        self._every_s = every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self.peak = 0

    def __enter__(self) -> MemoryMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._done.is_set():
            self.peak = max(self.peak, measure_memory(me))
            self._done.wait(self._every_s)
