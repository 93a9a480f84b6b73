"""The loop of reinforcement learning over episodes of several turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.environments.games import write_brief_model
from tests.faults.lab import Lab, end_well


@pytest.mark.slow
def test_a_policy_is_trained_in_an_environment_that_has_bad_days(
    tiny_model: Path, tmp_path: Path
) -> None:
    lab = Lab(tmp_path, write_brief_model(tiny_model, tmp_path / "brief"), "transformers")
    asked = [json.loads(line)["prompt"] for line in lab.prompts.read_text().splitlines()]
    settings = (
        "steps=2",
        "prompts_per_step=12",  # all that there are are asked
        "learner.count=1",
        "rollout.count=1",
        "sampling={max_tokens: 12}",
        "environment={source: 'tests.environments.games:Words', max_turns: 3, deadline_s: 1.5, "
        f"options: {{breaks: {asked[0]}, hangs: {asked[1]}}}}}",
        "reward={source: environment}",
        "mismatch_sample=24",
        "examples_every=1",
    )
    with lab.run(*settings) as run:
        end_well(run.start(), 0.0)
        summary, metrics = run.summary(), run.metrics()
        rows = [json.loads(line) for line in (run.done / "rollouts.jsonl").read_text().splitlines()]
    assert run.lost() == 0
    # What failed says nothing of the policy: set aside, counted, and never scored.
    for reason in ("environment raised LookupError", "environment gave no answer in 1.5 s"):
        assert summary[f"dropped/{reason}"] > 0
        lost = [row for row in rows if row["left_out"] == reason]
        assert len(lost) == summary[f"dropped/{reason}"]
        assert all(row["reward"] is None for row in lost)
    learned = [row for row in rows if row["left_out"] is None]
    assert len(learned) == summary["trained"]
    several = [row for row in learned if row["turns"] > 1]
    assert several and all(row["reward"] >= 1 for row in several)
    assert max(row["mismatch"] for row in learned if row["mismatch"] is not None) < 1e-4
    for row in [row for row in several if "tokens" in row]:
        tokens = row["tokens"]
        told = [t for t, own in zip(tokens["texts"], tokens["sampled"], strict=True) if not own]
        assert "w8" in "".join(told) and "w9" in "".join(told)
        assert all(
            (logprob is None) == (not own)
            for logprob, own in zip(tokens["logprobs"], tokens["sampled"], strict=True)
        )
    assert [row["step"] for row in metrics] == [0, 1]
    assert any(row["turns"] > 1 for row in metrics)
