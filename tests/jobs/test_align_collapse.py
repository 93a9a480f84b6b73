"""A policy that runs away is noticed, taken back to where it was sound, and in the end given up."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from raylign.tracking import read_lines
from raylign.training.batches import BatchFiles
from tests.faults.lab import Lab, require_clean

BOUND = 0.02


@pytest.mark.slow
def test_a_runaway_policy_is_taken_back_and_then_given_up(tiny_model: Path, tmp_path: Path) -> None:
    settings = (
        "steps=60",
        "checkpoint_every=1",
        "optimizer.lr=0.01",  # in a few steps it is far from where it was
        "algorithm.kl_coef=0.000001",
        f"guard={{max_kl: {BOUND}, window: 1, max_rollbacks: 1}}",
        "learner.count=1",
        "rollout.stall_s=60",
        "rollout.count=1",
    )
    with Lab(tmp_path, tiny_model, "transformers").run(*settings) as run:
        started = time.time()
        end = run.start().finish()
        assert end.status == 2 and time.time() - started < 600
        said = "align stopped after 1 rollbacks: kl is "
        assert said in end.last and f"align.guard.max_kl={BOUND}; the policy before" in end.last
        require_clean(run)
        first, last = run.events(what="collapse")
        assert [first["action"], last["action"]] == ["rollback", "stop"]
        assert 0 <= first["to"] == first["step"] - 2, "it began step - 1 beyond the bound"
        said = f"step {first['step']}: collapse rollback kl is"
        assert said in end.output, "whoever watches is told"

        # It went on from there, with versions that nobody has had before, and half the rate.
        learned = [row for row in run.events(what="learn") if row["time"] > first["time"]]
        assert [row["step"] for row in learned] == list(range(first["to"], last["step"]))
        assert learned[0]["version"] == first["step"] + 2
        rows = run.metrics()
        assert [row["step"] for row in rows] == list(range(last["step"]))
        assert all(row["kl"] <= BOUND for row in rows[:-1]) and rows[-1]["kl"] > BOUND
        [batch] = BatchFiles(run.stage / ".batches").read_from(last["step"] - 1)
        assert batch.settings["lr"] == 0.005, "the last one, which no checkpoint covers"
        sampled = [list[str](), list[str]()]
        for row in read_lines(run.stage / "rollouts.jsonl"):
            if row["step"] == first["to"]:
                sampled["undone" in row].append(row["completion"])
        assert len(sampled[0]) == len(sampled[1]) == 24, "all of them are kept"
        assert sampled[0] != sampled[1], "other samples"
        assert rows[0]["step_seconds"] >= rows[0]["wait/generator"], "the pause is no step's"
        assert run.events(what="restored", checkpoint=first["to"]), "no process was replaced"
        assert not run.events(what="lost")
