"""Faults of rollout workers. An engine lives in its worker's own process, so that killing either is
killing both, and nothing can be orphaned."""

from __future__ import annotations

import time
from typing import Any

from tests.faults.align_run import AlignRun
from tests.faults.lab import (
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

# Slow until successors have started beside the others and joined them; one rank is enough.
LONG = (
    "steps=120",
    "checkpoint_every=40",
    "sampling={max_tokens: 32}",
    "learner.count=1",
    "rollout.max_restarts=20",
    "rollout.stall_s=8",  # less, and a worker that waits for a busy machine would be taken for lost
    PACED,
)


def wait_for_successor(run: AlignRun, start: float) -> tuple[Outcome, dict[str, Any]]:
    """A worker was harmed: it must be missed, and a successor must prove the weights before it
    serves. The event of the loss, too."""
    lost = first_event(run, start, 60, what="lost")
    serves = first_event(run, start, 300, what="serves")
    proofs = [row for row in run.events(what="sync") if row["actor"] == serves["actor"]]
    assert proofs and proofs[0]["time"] <= serves["time"], "it served before it had proved"
    note = f"{lost['text']}; {serves['actor']} in its place"
    return Outcome(since(start, lost), since(start, serves), note), lost


def reach_goal(run: AlignRun) -> int:
    """The run must end well, with every sample as fresh, and every sync as exact, as promised; what
    was lost."""
    run.hurry()
    end_well(run, time.time())
    bound = max(int(row["staleness/max"]) for row in run.metrics())
    assert bound <= 1, f"a sample was {bound} versions old"
    proofs = [row for row in run.events(what="sync") if "canary_error" in row]
    worst = max(row["canary_error"] for row in proofs)
    assert worst < 1e-4, f"a canary was {worst} off"
    broken = [row for row in run.events(what="lost") if row["actor"] == "learner"]
    assert not broken, broken
    return run.lost()


@faults(
    (
        "1-3",
        "SIGKILL of a rollout worker, its engine in mid-decode",
        "its requests are made again by others; a successor serves once it has proved the weights",
    ),
    (
        "4",
        "SIGSTOP of a rollout worker in mid-decode: it hangs, its port still open",
        "silence is noticed within rollout.stall_s (8 s here); killed, replaced",
    ),
    (
        "5",
        "SIGKILL of a rollout worker between the first and the last tensor of new weights",
        "the others get theirs; learner and old version are untouched",
    ),
)
def harm_workers(lab: Lab, found: list[Outcome]) -> int:
    with lab.run(*LONG, swift=False) as run:
        run.start()
        run.wait_for_step(1)
        for harm in ("kill", "freeze", "transfer"):
            run.arm(harm)
            outcome, _ = wait_for_successor(run, run.struck(harm))
            found.append(outcome)
        return reach_goal(run)


@faults(
    (
        "6",
        "a successor says that it has taken the weights, and has those that it was born with",
        "refused by its canary, before any request; the next one proves the version, and serves",
    ),
    (
        "17",
        "a successor is killed while it starts",
        "another one is started; the run goes on with those that are left",
    ),
    (
        "8",
        "one request never returns: whoever has it forgets it, every time",
        "its prompt is named, given to another worker once, then dropped with the reason",
    ),
)
def harm_successors(lab: Lab, found: list[Outcome]) -> int:
    with lab.run(*LONG, "rollout.attempts=2", "rollout.canary_tolerance=1e-4") as run:
        run.start()
        run.wait_for_step(3)
        run.arm("stale")
        run.kill(run.processes("RolloutWorker")[:1])
        outcome, lost = wait_for_successor(run, run.struck("stale"))
        refused = [row for row in run.events(what="lost") if "fails its canary" in row["text"]]
        assert [row["actor"] for row in refused] == [lost["actor"]], refused
        did = {row["what"] for row in run.events(actor=lost["actor"])}
        assert did == {"started", "lost"}, f"who was refused did {did}"
        found.append(outcome)

        before = run.processes("RolloutWorker")
        start = run.kill(before[:1])
        run.kill(run.wait_for_another("RolloutWorker", before))
        found.append(wait_for_successor(run, start)[0])

        run.arm("request")
        start = run.struck("request")
        lost = first_event(run, start, 90, what="lost")
        dropped = first_event(run, start, 180, what="prompt lost")
        prompt = dropped["text"].split()[1]
        assert f"prompt {prompt}" in lost["text"], (lost, dropped)
        note = f"{lost['text']}; then set aside after {dropped['text'].count('rollout-')} workers"
        found.append(Outcome(since(start, lost), since(start, dropped), note))
        left = reach_goal(run)
        assert run.summary()["dropped/prompt lost"] == 4
        return left


@fault(
    "7",
    "all rollout workers killed, again and again",
    "ends in bounded time with the reason; checkpoint and batches are kept",
)
def kill_all(lab: Lab) -> Outcome:
    settings = ("steps=50", "rollout.max_restarts=1", "checkpoint_every=1", "learner.count=1")
    with lab.run(*settings, PACED) as run:
        run.start()
        run.wait_for_step(1)
        start = time.time()
        lost = None
        while run.running:
            run.kill(run.processes("RolloutWorker"))
            if lost is None:
                lost = first_event(run, start, 60, what="lost")
            time.sleep(0.5)
            if time.time() - start > 240:
                break
        end = run.finish(60)
        ended = time.time() - start
        assert end.status == 2 and "restarts allowed" in end.last, end.output[-2000:]
        require_clean(run)
        assert list((run.stage / ".checkpoints").glob("step-*"))
        assert lost is not None
        again = run.start("steps=3", "rollout.max_restarts=5").finish()
        assert again.status == 2 and "begun with" in again.last  # other steps: not the same run
        return Outcome(since(start, lost), ended, end.last)
