"""Signs of life: what every rank is doing, in a small file, and who keeps the others waiting.

A rank that hangs makes all others wait in a collective until it times out, and then all of them
fail alike. While they wait, the files tell them apart: the culprit has stopped (nothing of its
process moves) or is somewhere else than in a collective.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import sysconfig
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

BEAT_S = 0.5
PATIENCE = 0.75
"""Share of the collectives' timeout after which a rank is named: before they give up."""
# Order within a step.
PHASES = ("starting", "reading", "forward", "reducing", "measuring", "sampling", "saving", "ending")
_LIBRARY = sysconfig.get_path("stdlib")
_DEPTH = 20  # innermost frames that are looked at
_COLLECTIVE = (
    f"torch{os.sep}distributed",
    f"deepspeed{os.sep}comm",
    f"training{os.sep}peers.py",
    f"training{os.sep}pipeline_link.py",
)


@dataclass(frozen=True, slots=True)
class Mark:
    """What a rank says of itself."""

    rank: int
    pid: int
    born: str
    """When the process began, in the system's own units: tells a reused pid."""
    node: str
    """Ray's name of the machine; empty without Ray."""
    host: str
    step: int
    phase: str
    count: int
    """Rises with every sign of progress."""
    beat: int
    """Rises as long as the process runs."""
    waiting: bool
    """Inside a collective, or where ranks wait for each other."""
    where: str
    """The line of code that is being executed."""


@dataclass(frozen=True, slots=True)
class Laggard:
    """The rank that the others wait for."""

    mark: Mark
    reason: str
    seconds: float
    """Since it last made progress, or gave a sign."""

    def describe(self) -> str:
        """Who and where, for people."""
        mark = self.mark
        return (
            f"rank {mark.rank} ({mark.host}, process {mark.pid}) {self.reason} for "
            f"{self.seconds:.0f} s in step {mark.step}, {mark.phase}, at {mark.where}"
        )


class Pulse:
    """Writes a rank's mark, of the thread that made this, until it is stopped."""

    def __init__(self, directory: Path, rank: int, node: str = "", beat_s: float = BEAT_S) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file, self._beat_s = locate(directory, rank), beat_s
        self._watched = threading.get_ident()
        self._mark = Mark(
            rank, os.getpid(), read_birth(os.getpid()), node, socket.gethostname(), 0,
            PHASES[0], 0, 0, False, "",
        )  # fmt: skip
        self._stopped = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def mark(self, step: int, phase: str) -> None:
        """A phase of a step begins; costs nothing to speak of."""
        self._mark = replace(self._mark, step=step, phase=phase, count=self._mark.count + 1)

    def touch(self) -> None:
        """Progress within a phase."""
        self._mark = replace(self._mark, count=self._mark.count + 1)

    def stop(self) -> None:
        """No more signs, and no file: who has ended is waited for by nobody."""
        self._stopped.set()
        self._thread.join()
        self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        beat = 0
        while not self._stopped.wait(self._beat_s):
            beat += 1
            self._write(beat)

    def _write(self, beat: int = 0) -> None:
        waiting, where = _look_at(sys._current_frames().get(self._watched))
        mark = replace(self._mark, beat=beat, waiting=waiting, where=where)
        temporary = self._file.with_suffix(".new")
        try:
            temporary.write_text(json.dumps(asdict(mark)), encoding="utf-8")
            os.replace(temporary, self._file)
        except OSError:
            pass  # a full disk is told of by those who need it


@dataclass(slots=True)
class _Seen:
    """What was read of a rank, and when it last changed by our own clock."""

    mark: Mark
    alive: float
    progress: float
    waiting: float | None
    """Since when it waits for others, and nothing else."""


class Watch:
    """Reads the marks of a group and compares them. Clocks of different machines do not matter."""

    def __init__(self, directory: Path, timeout_s: float) -> None:
        self._directory, self._patience = directory, PATIENCE * timeout_s
        self._seen: dict[int, _Seen] = {}
        self._looked = time.monotonic()

    def look(self, now: float | None = None) -> Laggard | None:
        """The rank that keeps the others waiting for too long, if there is one."""
        now = time.monotonic() if now is None else now
        if now - self._looked > self._patience / 3:
            self._seen.clear()  # it is we who were away
        self._looked = now
        found = {mark.rank: mark for mark in read_marks(self._directory)}
        for rank in self._seen.keys() - found.keys():
            del self._seen[rank]
        for rank, mark in found.items():
            old = self._seen.get(rank)
            if old is None or (old.mark.pid, old.mark.born) != (mark.pid, mark.born):
                self._seen[rank] = _Seen(mark, now, now, now if mark.waiting else None)
                continue
            alive = now if mark.beat != old.mark.beat else old.alive
            moved = mark.count != old.mark.count
            progress = now if moved else old.progress
            since = now if moved or old.waiting is None else old.waiting
            self._seen[rank] = _Seen(mark, alive, progress, since if mark.waiting else None)
        return self._judge(now)

    def _judge(self, now: float) -> Laggard | None:
        seen = list(self._seen.values())
        silent = [s for s in seen if now - s.alive > self._patience]
        if silent:
            first = min(silent, key=lambda s: (s.alive, s.mark.rank))
            return Laggard(first.mark, "has given no sign", now - first.alive)
        if not seen or any(now - s.progress <= self._patience for s in seen):
            return None
        waits = [now - s.waiting for s in seen if s.waiting is not None]
        if waits and max(waits) <= self._patience:
            return None  # it takes long, but it has not kept anybody for long
        behind = [s for s in seen if s.waiting is None] if waits else _find_behind(seen)
        if not behind:
            return None
        last = min(behind, key=lambda s: (*_place(s.mark), s.mark.rank))
        return Laggard(last.mark, "has not moved", now - last.progress)


def _find_behind(seen: list[_Seen]) -> list[_Seen]:
    """Those behind the others, where nobody is seen waiting: a GPU's collectives are not waited
    for where they are called."""
    first = max(_place(s.mark) for s in seen)
    return [s for s in seen if _place(s.mark) < first]


def _place(mark: Mark) -> tuple[int, int]:
    return mark.step, PHASES.index(mark.phase)


def locate(directory: Path, rank: int) -> Path:
    """The file of a rank."""
    return directory / f"rank-{rank:05d}.json"


def read_marks(directory: Path) -> list[Mark]:
    """What all ranks say, as far as it can be read now."""
    marks = []
    for file in sorted(directory.glob("rank-*.json")):
        try:
            marks.append(Mark(**json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue  # it is gone, or not there yet
    return marks


def read_birth(pid: int) -> str:
    """When a process began; empty when there is none, or where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]


def end_process(mark: Mark) -> bool:
    """Kill a rank's process, stopped ones included; False when it is gone already. Must be called
    on its machine."""
    if read_birth(mark.pid) != mark.born:
        return False
    try:
        os.kill(mark.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _look_at(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a thread waits for other ranks, and the line it is at, of code that is not a
    library's."""
    waiting, where, depth = False, "", 0
    while frame is not None and depth < _DEPTH:
        file = frame.f_code.co_filename
        waiting = waiting or any(part in file for part in _COLLECTIVE)
        library = "site-packages" in file or file.startswith((_LIBRARY, "<"))
        if not where and not library:
            where = f"{Path(file).name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame, depth = frame.f_back, depth + 1
    return waiting, where or "a library"
