"""Faults of learner ranks: the group is restored from its checkpoint and the batches since, to the
bit; rollout workers, samples and versions stay."""

from __future__ import annotations

import time
from functools import partial

from tests.faults.align_run import AlignRun
from tests.faults.lab import PACED, Lab, Outcome, end_well, fault, faults, first_event, since

RANKS = (
    PACED,
    "max_staleness=0",
    "steps=16",
    "rollout.count=1",
    "learner.count=2",
    "learner.max_restarts=20",
    "checkpoint_every=5",  # so that there are updates to be repeated
)


def harm_rank(run: AlignRun, fault: str) -> float:
    """A fault of `sabotage`, as the rank begins an update that the others take part in."""
    run.arm(fault)
    return run.struck(fault)


def kill_again(run: AlignRun) -> float:
    """One rank, and another while the group is being restored."""
    first = run.processes("LearnerWorker")
    start = run.kill(first[1:])
    run.kill(run.wait_for_another("LearnerWorker", first)[:1])
    return start


HARMS = {
    "10": (1, partial(harm_rank, fault="kill-rank-1")),
    "11": (0, partial(harm_rank, fault="kill-rank-0")),
    "12": (1, partial(harm_rank, fault="freeze-rank-1")),
    "12b": (0, partial(harm_rank, fault="freeze-rank-0")),
    "13": (1, partial(harm_rank, fault="block-rank-1")),
    "17b": (None, kill_again),
}
"""Which rank is to be named, and what is done to it."""


@faults(
    (
        "10",
        "SIGKILL of the last learner rank",
        "group restored, finished samples kept, engines stay up; weights equal to the bit",
    ),
    ("11", "SIGKILL of the first learner rank", "the same"),
    (
        "12",
        "SIGSTOP of a learner rank",
        "found within engine.timeout_s (8 s here), named, stacks of all ranks kept, restored",
    ),
    ("12b", "SIGSTOP of the first learner rank", "the same"),
    (
        "13",
        "the thread of a rank that learns is blocked, its process alive",
        "the others' collective runs into engine.timeout_s (8 s here); named, stacks kept",
    ),
    ("17b", "a learner rank is killed while the group is being restored", "restored once more"),
)
def harm_ranks(lab: Lab, found: list[Outcome]) -> int:
    with lab.run(*RANKS) as run:
        run.start()
        run.wait_for_step(1)
        engines = {process.pid for process in run.processes("RolloutWorker")}
        for number, (rank, harm) in HARMS.items():
            known = set(_list_stacks(run))
            start = harm(run)
            lost = first_event(run, start, 90, what="lost", actor="learner")
            restored = first_event(run, start, 400, what="restored")
            assert rank is None or lost["rank"] == rank, lost
            [stacks, *_] = [text for text in _list_stacks(run) if text not in known] or [""]
            assert "most recent call first" in stacks, "no stacks were kept"
            if number in ("12", "12b", "13"):
                assert "learner_rank.py" in stacks, stacks
            note = f"{lost['text']}; {restored['repeated']} updates repeated; equal weights"
            found.append(Outcome(since(start, lost), since(start, restored), note))
            step = max(row["step"] for row in run.metrics())
            run.wait_for_step(step + 1)
        alive = {process.pid for process in run.processes("RolloutWorker")}
        assert engines == alive, "rollout workers did not stay up"
        run.hurry()
        end_well(run, time.time())
        assert run.weights() == lab.reference(*RANKS), "other weights than an uninterrupted run's"
        return run.lost()


def _list_stacks(run: AlignRun) -> list[str]:
    return [file.read_text() for file in (run.stage.parent / "stacks").glob("*.txt")]


@fault(
    "18",
    "the learner dies at the same step again and again",
    "stops after learner.max_restarts with the first reason",
)
def crash_loop(lab: Lab) -> Outcome:
    with lab.run(PACED, "steps=40", "rollout.count=1", "learner.max_restarts=1") as run:
        run.start()
        run.wait_for_step(1)
        start = time.time()
        while run.running:
            run.kill(run.processes("LearnerWorker"))
            time.sleep(0.3)
            assert time.time() - start < 240
        end = run.finish(60)
        assert end.status == 2 and "2 learner failures, 1 restarts allowed" in end.last, end.last
        lost = run.events(what="lost", actor="learner")
        return Outcome(since(start, lost[0]), time.time() - start, end.last)


@fault(
    "33",
    "a gradient that is no number",
    "no rank takes the step; back to the last good checkpoint with other samples",
)
def poison_gradient(lab: Lab) -> Outcome:
    with lab.run("rollout.count=1", "optimizer.lr=1e30") as run:  # a step, and nothing is finite
        start = time.time()
        end = run.start().finish()
        assert end.status == 2 and "after 2 rollbacks" in end.last, end.output[-2000:]
        collapses = run.events(what="collapse")
        assert [row["action"] for row in collapses] == ["rollback", "rollback", "stop"]
        return Outcome(None, time.time() - start, end.last)
