"""Faults of the run itself, and of Ray's head: the same command goes on where it was."""

from __future__ import annotations

import signal
import time

import psutil

from tests.faults.align_run import AlignRun
from tests.faults.lab import (
    ALONE,
    PACED,
    Lab,
    Outcome,
    end_well,
    fault,
    faults,
    first_event,
    require_clean,
    since,
)

LOCKSTEP = (*ALONE, PACED, "max_staleness=0", "steps=4")


@faults(
    (
        "15",
        "SIGTERM of the run, as on preemption",
        "exits 130 within seconds, leaves no process; the same command goes on where it was",
    ),
    (
        "14",
        "SIGKILL of the run's own process",
        "the same command goes on, with nothing edited",
    ),
    (
        "26",
        "the same run ended after every single step, in one of these ways",
        "final weights equal an uninterrupted run's to the bit",
    ),
)
def end_run_at_every_step(lab: Lab, found: list[Outcome]) -> int:
    with lab.run(*LOCKSTEP) as run:
        began = start = time.time()
        for step, stop in enumerate((_preempt, _kill, _kill)):
            run.start()
            if step:
                found[-1] = _see_resume(run, start, found[-1])
            run.wait_for_step(step)
            start = time.time()
            outcome = stop(run)
            if step < 2:
                found.append(outcome)
        run.start()
        run.hurry()
        end_well(run, began)
        assert run.weights() == lab.reference(*LOCKSTEP), "other weights"
        found.append(Outcome(None, time.time() - began, "ended 3 times in 4 steps; equal weights"))
        return run.lost()


def _see_resume(run: AlignRun, start: float, outcome: Outcome) -> Outcome:
    resumed = first_event(run, start, 300, what="resumed")
    note = f"{outcome.note}; resumed at step {resumed['step']}"
    return Outcome(outcome.detected_s, since(start, resumed), note)


def _preempt(run: AlignRun) -> Outcome:
    start = run.kill([run.driver], signal.SIGTERM)
    end = run.finish(60)
    ended = time.time() - start
    assert end.status == 130, end.output[-2000:]
    require_clean(run)
    return Outcome(ended, None, "exited 130")


def _kill(run: AlignRun) -> Outcome:
    start = run.kill([run.driver])
    run.finish(30)
    ended = time.time() - start
    wait_for_orphans(run)
    return Outcome(ended, None, "all of its processes gone")


@fault(
    "16",
    "SIGKILL of Ray's head (GCS), which does not come back",
    "ends with a line that says so (after 45 s; 4 s here); the same command goes on from disk",
)
def kill_head(lab: Lab) -> Outcome:
    with lab.run(*LOCKSTEP) as run:
        # Ray's own patience is a minute; actors that need nothing of the head go on meanwhile.
        run.start(RAY_gcs_rpc_server_reconnect_timeout_s="5", RAYLIGN_FAULT_PACE="0.5")
        run.wait_for_step(0)
        heads = [p for p in run.left_behind() if "gcs_server" in " ".join(p.cmdline())]
        assert heads
        start = run.kill(heads)
        end = run.finish(180)
        ended = time.time() - start
        assert end.status == 2 and "Ray's head at" in end.last, end.output[-2000:]
        wait_for_orphans(run)
        run.start()
        run.hurry()
        resumed = first_event(run, start, 300, what="resumed")
        end_well(run, start)
        return Outcome(ended, since(start, resumed), f"{end.status}: {end.last}", run.lost())


@fault(
    "14b",
    "SIGKILL with samples in flight and learning a version behind",
    "finished groups are found again, the others are asked for again; nothing is trained twice",
    quick=True,
)
def kill_driver_in_flight(lab: Lab) -> Outcome:
    with lab.run(*ALONE, PACED, "max_staleness=2", "steps=4") as run:
        run.start()
        run.wait_for_step(0)
        start = run.kill([run.driver])
        run.finish(30)
        wait_for_orphans(run)
        kept = len(list((run.stage / ".groups").glob("*.safetensors")))
        run.hurry()
        run.start()
        resumed = first_event(run, start, 300, what="resumed")
        end_well(run, start)
        summary = run.summary()
        assert summary["trained"] <= 4 * 6 * 4, summary
        note = f"{kept} finished groups found again"
        return Outcome(None, since(start, resumed), note, run.lost())


def wait_for_orphans(run: AlignRun) -> None:
    """Ray ends what belonged to a dead driver by itself; what it leaves is killed."""
    end = time.monotonic() + 15
    while run.left_behind() and time.monotonic() < end:
        time.sleep(0.2)
    for process in run.left_behind():
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.Error:
            continue
