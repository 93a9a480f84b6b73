"""Faults of rollout workers. An engine lives in its worker's own process, so that killing either is
killing both, and nothing can be orphaned."""

from __future__ import annotations

import time

from tests.faults.align_run import AlignRun
from tests.faults.lab import (
    Lab,
    Outcome,
    end_well,
    fault,
    first_event,
    require_clean,
    since,
)

# Slow until a successor has started beside the others and joined them; one rank is enough.
LONG = (
    "steps=60",
    "checkpoint_every=30",
    "sampling={max_tokens: 32}",
    "learner.count=1",
    "reward.source=tests.faults.rewards:paced",
)


def expect_replacement(run: AlignRun, start: float) -> Outcome:
    """A worker was harmed: it must be missed, a successor must prove the weights before it serves,
    and the run must reach its goal."""
    lost = first_event(run, start, 60, what="lost")
    serves = first_event(run, start, 300, what="serves")
    run.hurry()
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
    with lab.run(*LONG, swift=False) as run:
        run.start(RAYLIGN_FAULT="kill_in_decode")
        return expect_replacement(run, run.struck("decode"))


@fault(
    "4",
    "SIGSTOP of a rollout worker in mid-decode: it hangs, its port still open",
    "silence is noticed within rollout.stall_s (4 s here); killed, replaced",
)
def freeze_worker(lab: Lab) -> Outcome:
    with lab.run(*LONG, swift=False) as run:
        run.start(RAYLIGN_FAULT="freeze_in_decode")
        return expect_replacement(run, run.struck("decode"))


@fault(
    "5",
    "SIGKILL of a rollout worker between the first and the last tensor of new weights",
    "the others get theirs; learner and old version are untouched",
)
def kill_in_transfer(lab: Lab) -> Outcome:
    with lab.run(*LONG, swift=False) as run:
        run.start(RAYLIGN_FAULT="die_in_transfer")
        start = run.struck("transfer")
        outcome = expect_replacement(run, start)
        learned = [row for row in run.events(what="lost") if row["actor"] == "learner"]
        assert not learned, learned
        return outcome


@fault(
    "6",
    "a successor says that it has taken the weights, and serves its first ones",
    "refused by its canary, before any request; the next one proves the version, and serves",
)
def serve_old_weights(lab: Lab) -> Outcome:
    with lab.run(*LONG, "rollout.canary_tolerance=1e-4") as run:
        run.start(RAYLIGN_FAULT="serve_old_weights")
        run.wait_for_step(3)
        run.kill(run.processes("RolloutWorker")[:1])
        start = run.struck("stale")
        lost = first_event(run, start, 60, what="lost")
        serves = first_event(run, start, 300, what="serves")
        run.hurry()
        end_well(run, start)
        refused = [row for row in run.events(what="lost") if "fails its canary" in row["text"]]
        assert [row["actor"] for row in refused] == [lost["actor"]], refused
        did = {row["what"] for row in run.events(actor=lost["actor"])}
        assert did == {"started", "lost"}, f"who was refused did {did}"
        return Outcome(since(start, lost), since(start, serves), run.lost(), lost["text"])


@fault(
    "7",
    "all rollout workers killed, again and again",
    "ends in bounded time with the reason; checkpoint and batches are kept",
)
def kill_all(lab: Lab) -> Outcome:
    settings = ("steps=50", "rollout.max_restarts=1", "checkpoint_every=1", "learner.count=1")
    with lab.run(*settings) as run:
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
        ended = time.time() - start
        assert end.status == 2 and "restarts allowed" in end.last, end.output[-2000:]
        require_clean(run)
        assert list((run.stage / ".checkpoints").glob("step-*"))
        assert lost is not None
        again = run.start("steps=3", "rollout.max_restarts=5").finish()
        assert again.status == 2 and "begun with" in again.last  # other steps: not the same run
        return Outcome(since(start, lost), ended, 0, end.last)


@fault(
    "8",
    "one request never returns: whoever has it forgets it, every time",
    "its prompt is named, given to another worker once, then dropped with the reason",
)
def lose_request(lab: Lab) -> Outcome:
    with lab.run("steps=8", "learner.count=1", "rollout.attempts=2") as run:
        run.start(RAYLIGN_FAULT="lose_request")
        start = run.struck("request")
        lost = first_event(run, start, 60, what="lost")
        dropped = first_event(run, start, 120, what="prompt lost")
        end_well(run, start)
        prompt = dropped["text"].split()[1]
        assert prompt in lost["text"], (lost, dropped)
        assert run.summary()["dropped/prompt lost"] == 4
        note = f"{lost['text']}; then: {dropped['text']}"
        return Outcome(since(start, lost), since(start, dropped), run.lost(), note)


@fault(
    "17",
    "a successor is killed while it starts",
    "another one is started; the run goes on with those that are left",
)
def kill_successor(lab: Lab) -> Outcome:
    with lab.run(*LONG) as run:
        run.start()
        run.wait_for_step(1)
        first = run.processes("RolloutWorker")
        start = run.kill(first[:1])
        run.kill(run.wait_for_another("RolloutWorker", first))
        return expect_replacement(run, start)
