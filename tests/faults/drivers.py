"""Faults of the run itself, and of Ray's head: the same command goes on where it was."""

from __future__ import annotations

import signal
import time

import psutil

from tests.faults.lab import (
    ALONE,
    LOCKSTEP,
    Lab,
    Outcome,
    end_well,
    fault,
    first_event,
    require_clean,
    since,
)


@fault(
    "14",
    "SIGKILL of the run's own process",
    "the same command goes on; weights equal an uninterrupted run's to the bit",
    quick=True,
)
def kill_driver(lab: Lab) -> Outcome:
    with lab.run(*LOCKSTEP) as run:
        run.start()
        run.wait_for_step(2)
        start = run.kill([run.driver])
        run.finish(30)
        ended = time.time() - start
        _wait_for_orphans(run)
        run.start()
        resumed = first_event(run, start, 300, what="resumed")
        end_well(run, start)
        assert run.weights() == lab.reference(*LOCKSTEP), (
            "other weights than an uninterrupted run's"
        )
        note = f"resumed at step {resumed['step']}; equal weights"
        return Outcome(ended, since(start, resumed), run.lost(), note)


@fault(
    "26",
    "SIGKILL after every single step, one after another",
    "final weights equal an uninterrupted run's to the bit",
)
def kill_at_every_step(lab: Lab) -> Outcome:
    with lab.run(*LOCKSTEP) as run:
        start = time.time()
        for step in range(3):
            run.start()
            run.wait_for_step(step)
            run.kill([run.driver])
            run.finish(30)
            _wait_for_orphans(run)
        run.start()
        end_well(run, start)
        assert run.weights() == lab.reference(*LOCKSTEP)
        return Outcome(None, time.time() - start, run.lost(), "3 kills; equal weights")


@fault(
    "14b",
    "SIGKILL with samples in flight and learning a version behind",
    "finished groups are found again, the others are asked for again; nothing is trained twice",
)
def kill_driver_in_flight(lab: Lab) -> Outcome:
    with lab.run(*ALONE, "max_staleness=2", "steps=6") as run:
        run.start()
        run.wait_for_step(2)
        start = run.kill([run.driver])
        run.finish(30)
        _wait_for_orphans(run)
        kept = len(list((run.stage / ".groups").glob("*.safetensors")))
        run.start()
        resumed = first_event(run, start, 300, what="resumed")
        end_well(run, start)
        return Outcome(
            None, since(start, resumed), run.lost(), f"{kept} finished groups found again"
        )


@fault(
    "15",
    "SIGTERM of the run, as on preemption",
    "exits 130 within seconds, leaves no process; the same command goes on where it was",
)
def preempt(lab: Lab) -> Outcome:
    with lab.run(*LOCKSTEP) as run:
        run.start()
        run.wait_for_step(1)
        start = run.kill([run.driver], signal.SIGTERM)
        end = run.finish(30)
        ended = time.time() - start
        assert end.status == 130, end.output[-2000:]
        require_clean(run)
        run.start()
        resumed = first_event(run, start, 300, what="resumed")
        end_well(run, start)
        assert run.weights() == lab.reference(*LOCKSTEP)
        return Outcome(
            ended, since(start, resumed), run.lost(), "weights equal an uninterrupted run's"
        )


@fault(
    "16",
    "SIGKILL of Ray's head (GCS)",
    "ends in bounded time; the same command goes on from disk",
)
def kill_head(lab: Lab) -> Outcome:
    with lab.run(*LOCKSTEP) as run:
        run.start()
        run.wait_for_step(1)
        heads = [p for p in run.left_behind() if "gcs_server" in " ".join(p.cmdline())]
        assert heads
        start = run.kill(heads)
        end = run.finish(150)
        ended = time.time() - start
        assert end.status != 0
        _wait_for_orphans(run)
        run.start()
        resumed = first_event(run, start, 300, what="resumed")
        end_well(run, start)
        assert run.weights() == lab.reference(*LOCKSTEP)
        return Outcome(ended, since(start, resumed), run.lost(), "equal weights")


def _wait_for_orphans(run) -> None:  # type: ignore[no-untyped-def]
    """Ray ends what belonged to a dead driver by itself; what it leaves is killed."""
    end = time.monotonic() + 15
    while run.left_behind() and time.monotonic() < end:
        time.sleep(0.2)
    for process in run.left_behind():
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.Error:
            continue
