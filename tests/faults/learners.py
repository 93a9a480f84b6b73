"""Faults of learner ranks: the group is restored from its checkpoint and the batches since, to the
bit; rollout workers, samples and versions stay."""

from __future__ import annotations

import signal
import time

import psutil

from tests.faults.align_run import AlignRun
from tests.faults.lab import RANKS, Lab, Outcome, end_well, fault, first_event, since


def _rank(run: AlignRun, rank: int) -> psutil.Process:
    return run.wait(f"rank {rank}", lambda: run.processes("LearnerWorker"), 60)[rank]


def _lose(lab: Lab, rank: int, number: int, deadline_s: float = 30) -> Outcome:
    with lab.run(*RANKS) as run:
        run.start()
        run.wait_for_step(1)
        engines = {process.pid for process in run.processes("RolloutWorker")}
        return _expect_restored(lab, run, run.kill([_rank(run, rank)], number), deadline_s, engines)


def _expect_restored(
    lab: Lab, run: AlignRun, start: float, deadline_s: float, engines: set[int]
) -> Outcome:
    """A rank was harmed: the group must be restored with everything else as it was, and reach the
    same weights."""
    lost = first_event(run, start, deadline_s, what="lost", actor="learner")
    restored = first_event(run, start, 300, what="restored")
    alive = {process.pid for process in run.processes("RolloutWorker")}
    assert engines == alive, "rollout workers did not stay up"
    end_well(run, start)
    assert run.weights() == lab.reference(*RANKS), "other weights than an uninterrupted run's"
    dumps = [file.read_text() for file in (run.stage.parent / "stacks").glob("*.txt")]
    assert any("most recent call first" in text for text in dumps), "no stacks were kept"
    note = f"{lost['text']}; {restored['repeated']} updates repeated; stacks kept; equal weights"
    return Outcome(since(start, lost), since(start, restored), run.lost(), note)


@fault(
    "10",
    "SIGKILL of the last learner rank",
    "group restored, finished samples kept, engines stay up; weights equal to the bit",
)
def kill_last_rank(lab: Lab) -> Outcome:
    return _lose(lab, 1, signal.SIGKILL)


@fault("11", "SIGKILL of the first learner rank", "the same")
def kill_first_rank(lab: Lab) -> Outcome:
    return _lose(lab, 0, signal.SIGKILL)


@fault(
    "12",
    "SIGSTOP of a learner rank",
    "found within engine.timeout_s (8 s here), named, stacks of all ranks kept, restored",
)
def freeze_rank(lab: Lab) -> Outcome:
    return _lose(lab, 1, signal.SIGSTOP, deadline_s=60)


@fault("12b", "SIGSTOP of the first learner rank", "the same")
def freeze_first_rank(lab: Lab) -> Outcome:
    return _lose(lab, 0, signal.SIGSTOP, deadline_s=60)


@fault(
    "13",
    "the thread of a rank that learns is blocked, its process alive",
    "the others' collective runs into engine.timeout_s (8 s here); named, stacks kept, restored",
)
def block_training(lab: Lab) -> Outcome:
    with lab.run(*RANKS) as run:
        run.start(RAYLIGN_FAULT="block_training")
        start = run.struck("block")
        engines = {process.pid for process in run.processes("RolloutWorker")}
        return _expect_restored(lab, run, start, 60, engines)


@fault(
    "17b",
    "a learner rank is killed while the group is being restored",
    "restored once more",
)
def kill_twice(lab: Lab) -> Outcome:
    with lab.run(*RANKS) as run:
        run.start()
        run.wait_for_step(1)
        first = run.processes("LearnerWorker")
        start = run.kill(first[1:])
        run.kill(run.wait_for_another("LearnerWorker", first)[:1])
        lost = first_event(run, start, 30, what="lost", actor="learner")
        restored = first_event(run, start, 300, what="restored")
        end_well(run, start)
        assert run.weights() == lab.reference(*RANKS)
        return Outcome(since(start, lost), since(start, restored), run.lost(), "equal weights")


@fault(
    "18",
    "the learner dies at the same step again and again",
    "stops after learner.max_restarts with the first reason",
)
def crash_loop(lab: Lab) -> Outcome:
    with lab.run("steps=40", "rollout.count=1", "learner.max_restarts=2") as run:
        run.start()
        run.wait_for_step(1)
        start = time.time()
        while run.driver.is_running() and run.driver.status() != psutil.STATUS_ZOMBIE:
            run.kill(run.processes("LearnerWorker"))
            time.sleep(0.3)
            assert time.time() - start < 180
        end = run.finish(60)
        assert end.status == 2 and "3 learner failures, 2 restarts allowed" in end.last, end.last
        lost = run.events(what="lost", actor="learner")
        return Outcome(since(start, lost[0]), time.time() - start, 0, end.last)


@fault(
    "33",
    "a gradient that is no number",
    "no rank takes the step; back to the last good checkpoint with other samples",
)
def poison_gradient(lab: Lab) -> Outcome:
    with lab.run("rollout.count=1", "optimizer.lr=1e30") as run:  # two steps, and nothing is finite
        start = time.time()
        end = run.start().finish()
        assert end.status == 2 and "after 2 rollbacks" in end.last, end.output[-2000:]
        collapses = run.events(what="collapse")
        assert [row["action"] for row in collapses] == ["rollback", "rollback", "stop"]
        return Outcome(None, time.time() - start, 0, end.last)
