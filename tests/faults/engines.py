"""Faults of rollout workers. An engine lives in its worker's own process, so that killing either is
killing both, and nothing can be orphaned."""

from __future__ import annotations

import signal
import time

from tests.faults.align_run import AlignRun
from tests.faults.lab import (
    Lab,
    Outcome,
    end_well,
    fault,
    first_event,
    hang,
    require_clean,
    since,
)

# Long enough for a successor to start beside the others and join them.
_LONG = ("steps=150", "checkpoint_every=50", "sampling={max_tokens: 32}")


def expect_replacement(run: AlignRun, start: float) -> Outcome:
    """A worker was harmed: it must be missed, a successor must prove the weights before it serves,
    and the run must reach its goal."""
    lost = first_event(run, start, 30, what="lost")
    serves = first_event(run, start, 300, what="serves")
    end_well(run, start)
    bound = max(int(row["staleness/max"]) for row in run.metrics())
    assert bound <= 1, f"a sample was {bound} versions old"
    proofs = [row for row in run.events(what="sync") if row["actor"] == serves["actor"]]
    assert proofs and proofs[0]["time"] <= serves["time"], "it served before it had proved"
    worst = max(row["canary_error"] for row in run.events(what="sync"))
    assert worst < 1e-4, f"a canary was {worst} off"
    note = f"{lost['text']}; {serves['actor']} in its place"
    return Outcome(since(start, lost), since(start, serves), run.lost(), note)


@fault(
    "1-3",
    "SIGKILL of a rollout worker, its engine in mid-decode",
    "its requests are made again by others; a successor serves once it has proved the weights",
)
def kill_worker(lab: Lab) -> Outcome:
    with lab.run(*_LONG) as run:
        run.start()
        run.wait_for_step(1)
        return expect_replacement(run, run.kill(run.processes("RolloutWorker")[:1]))


@fault(
    "4",
    "SIGSTOP of a rollout worker: it hangs, its port still open",
    "silence is noticed within rollout.stall_s (4 s here); killed, replaced",
)
def freeze_worker(lab: Lab) -> Outcome:
    with lab.run(*_LONG) as run:
        run.start()
        run.wait_for_step(1)
        return expect_replacement(run, hang(run, "RolloutWorker"))


@fault(
    "5",
    "SIGKILL of a rollout worker in the moment that new weights are published",
    "the others get theirs; learner and old version are untouched",
)
def kill_in_transfer(lab: Lab) -> Outcome:
    with lab.run(*_LONG) as run:
        run.start()
        run.wait_for_step(1)
        worker, done = run.processes("RolloutWorker")[0], len(run.events(what="learn"))
        run.wait("an update", lambda: len(run.events(what="learn")) > done)
        return expect_replacement(run, run.kill([worker]))


@fault(
    "7",
    "all rollout workers killed, again and again",
    "ends in bounded time with the reason; checkpoint and batches are kept",
)
def kill_all(lab: Lab) -> Outcome:
    with lab.run("steps=50", "rollout.max_restarts=1", "checkpoint_every=1") as run:
        run.start()
        run.wait_for_step(1)
        start = time.time()
        lost = None
        while run.driver.is_running() and run.driver.status() != "zombie":
            run.kill(run.processes("RolloutWorker"))
            if lost is None:
                lost = first_event(run, start, 30, what="lost")
            time.sleep(0.5)
            if time.time() - start > 120:
                break
        end = run.finish(60)
        assert end.status == 2 and "restarts allowed" in end.last, end.output[-2000:]
        require_clean(run)
        assert list((run.stage / ".checkpoints").glob("step-*"))
        assert lost is not None
        again = run.start("steps=3", "rollout.max_restarts=5").finish()
        assert again.status == 2 and "begun with" in again.last  # other steps: not the same run
        return Outcome(since(start, lost), end.seconds, 0, end.last)


@fault(
    "17",
    "a successor is killed while it starts",
    "another one is started; the run goes on with those that are left",
)
def kill_successor(lab: Lab) -> Outcome:
    with lab.run(*_LONG) as run:
        run.start()
        run.wait_for_step(1)
        first = run.processes("RolloutWorker")
        start = run.kill(first[:1])
        run.kill(run.wait_for_another("RolloutWorker", first))
        return expect_replacement(run, start)


@fault(
    "15",
    "SIGTERM of the run, as on preemption",
    "exits 130 within seconds, leaves no process; the same command goes on where it was",
)
def preempt(lab: Lab) -> Outcome:
    with lab.run("max_staleness=0") as run:
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
        assert run.weights() == lab.reference()
        return Outcome(
            ended, since(start, resumed), run.lost(), "weights equal an uninterrupted run's"
        )
