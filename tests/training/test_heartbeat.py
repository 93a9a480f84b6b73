"""Who keeps the others waiting: marks that are compared, and marks of real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import raylign
from raylign.training.heartbeat import (
    Mark,
    Pulse,
    Watch,
    end_process,
    locate,
    read_birth,
    read_marks,
)

MARK = Mark(0, 100, "1", "", "host", 5, "forward", 10, 20, True, "x.py:1 (f)")
TIMEOUT = 60.0  # named after 45 s


def put(directory: Path, *marks: Mark) -> None:
    for mark in marks:
        locate(directory, mark.rank).write_text(json.dumps(asdict(mark)))


def look(watch: Watch, directory: Path, start: int, seconds: int, *marks: Mark, alive: bool = True):
    """Look once a second, while marks beat and nothing else happens."""
    for second in range(start, start + seconds):
        beats = [replace(m, beat=second) if alive or m.rank == 0 else m for m in marks]
        put(directory, *beats)
        if found := watch.look(1000.0 + second):
            return second - start, found
    return None


def make_watch(directory: Path) -> Watch:
    watch = Watch(directory, TIMEOUT)
    watch._looked = 1000.0
    return watch


def test_a_rank_elsewhere_than_in_a_collective_is_named(tmp_path: Path) -> None:
    watch = make_watch(tmp_path)
    stuck = replace(MARK, rank=2, waiting=False, phase="reading", where="rows.py:140 (read)")
    found = look(watch, tmp_path, 0, 60, MARK, replace(MARK, rank=1), stuck)
    assert found is not None
    second, laggard = found
    assert second == 46 and laggard.mark.rank == 2
    assert laggard.describe() == (
        "rank 2 (host, process 100) has not moved for 46 s in step 5, reading, at rows.py:140 "
        "(read)"
    )


def test_a_rank_that_gives_no_sign_is_named(tmp_path: Path) -> None:
    """Stopped in a collective, it looks as if it waited like the others."""
    found = look(make_watch(tmp_path), tmp_path, 0, 60, MARK, replace(MARK, rank=1), alive=False)
    assert found is not None and found[1].mark.rank == 1
    assert "has given no sign for 46 s" in found[1].describe()


def test_nobody_is_named_while_somebody_moves(tmp_path: Path) -> None:
    watch = make_watch(tmp_path)
    slow = replace(MARK, rank=1, waiting=False)
    for second in range(0, 120, 30):
        busy = replace(slow, count=second)
        assert look(watch, tmp_path, second, 30, MARK, busy) is None


def test_a_long_phase_is_named_only_when_it_has_kept_others_waiting(tmp_path: Path) -> None:
    """Loading, reading or computing for long is no fault: keeping somebody waiting for long is."""
    watch = make_watch(tmp_path)
    slow, busy = replace(MARK, rank=1, waiting=False), replace(MARK, waiting=False)
    assert look(watch, tmp_path, 0, 50, busy, slow) is None
    found = look(watch, tmp_path, 50, 60, MARK, slow)  # the first has come to the collective
    assert found is not None and found[0] == 46 and found[1].mark.rank == 1
    assert "has not moved for 96 s" in found[1].describe()


def test_waiting_begins_again_with_every_sign_of_progress(tmp_path: Path) -> None:
    """As in a wait that is made of many short collectives."""
    watch = make_watch(tmp_path)
    slow = replace(MARK, rank=1, waiting=False)
    for second in range(0, 160, 40):
        patient = replace(MARK, count=second)
        assert look(watch, tmp_path, second, 40, patient, slow) is None
    found = look(watch, tmp_path, 160, 60, patient, slow)
    assert found is not None and found[0] == 6


def test_nobody_is_named_when_all_wait_or_all_compute(tmp_path: Path) -> None:
    for waiting in (True, False):
        marks = [replace(MARK, rank=rank, waiting=waiting) for rank in range(3)]
        assert look(make_watch(tmp_path), tmp_path, 0, 80, *marks) is None


def test_the_one_behind_is_named_where_waiting_cannot_be_seen(tmp_path: Path) -> None:
    marks = [
        replace(MARK, rank=rank, waiting=False, phase=phase)
        for rank, phase in enumerate(("reducing", "forward", "reducing"))
    ]
    found = look(make_watch(tmp_path), tmp_path, 0, 60, *marks)
    assert found is not None and found[1].mark.rank == 1


def test_a_new_group_starts_afresh_and_a_sleeping_driver_blames_nobody(tmp_path: Path) -> None:
    watch = make_watch(tmp_path)
    stuck = replace(MARK, rank=1, waiting=False)
    assert look(watch, tmp_path, 0, 40, MARK, stuck) is None
    again = [replace(m, pid=m.pid + 7) for m in (MARK, stuck)]
    assert look(watch, tmp_path, 40, 40, *again) is None
    assert look(watch, tmp_path, 500, 40, *again) is None  # seven minutes of sleep
    locate(tmp_path, 1).unlink()
    locate(tmp_path, 0).write_text('{"rank"')
    assert watch.look(1541.0) is None and read_marks(tmp_path) == []


def wait_for(condition, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_pulse_says_where_its_thread_is(tmp_path: Path) -> None:
    released, pulses = threading.Event(), []

    def work_of_the_user() -> None:
        pulses.append(Pulse(tmp_path, 3, "node", beat_s=0.02))
        pulses[0].mark(7, "reading")
        released.wait(20)

    thread = threading.Thread(target=work_of_the_user)
    thread.start()
    wait_for(lambda: any(m.count and m.beat > 2 for m in read_marks(tmp_path)))
    [mark] = read_marks(tmp_path)
    assert (mark.rank, mark.node, mark.step, mark.phase) == (3, "node", 7, "reading")
    assert mark.where.startswith("test_heartbeat.py:") and "(work_of_the_user)" in mark.where
    assert not mark.waiting
    pulses[0].touch()
    wait_for(lambda: read_marks(tmp_path)[0].count == 2)
    released.set()
    thread.join()
    pulses[0].stop()
    assert read_marks(tmp_path) == []


SLEEPER = """
import sys, time
from pathlib import Path
from raylign.training.heartbeat import Pulse
Pulse(Path(sys.argv[1]), int(sys.argv[2]), beat_s=0.02)
time.sleep(60)
"""


def test_a_stopped_process_is_found_and_ended(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(Path(raylign.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", SLEEPER, str(tmp_path), "1"], env=environment)
    try:
        wait_for(lambda: any(m.beat > 2 for m in read_marks(tmp_path)), 30)
        process.send_signal(signal.SIGSTOP)
        watch = Watch(tmp_path, 0.8)
        found = []
        wait_for(lambda: found.append(watch.look()) or found[-1] is not None)
        mark = found[-1].mark
        assert mark.pid == process.pid and mark.born == read_birth(process.pid)
        assert not end_process(replace(mark, born="0")), "a pid that was given anew"
        assert end_process(mark)
        assert process.wait(10) == -signal.SIGKILL
        assert not end_process(mark)
    finally:
        process.kill()


@pytest.mark.parametrize("pid", [2**22 + 1])
def test_no_process_has_no_birth(pid: int) -> None:
    assert read_birth(pid) == ""
