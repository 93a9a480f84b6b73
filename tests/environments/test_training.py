"""The loop of reinforcement learning over episodes of several turns."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.lab import Lab, end_well


@pytest.mark.slow
def test_a_policy_is_trained_in_an_environment_that_has_bad_days(
    tiny_model: Path, tmp_path: Path
) -> None:
    lab = Lab(tmp_path, tiny_model, "transformers")
    asked = [json.loads(line)["prompt"] for line in lab.prompts.read_text().splitlines()]
    settings = (
        "steps=4",
        "learner.count=1",
        "rollout.count=2",
        "sampling={max_tokens: 12, temperature: 1.5}",
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
    raised, silent = (
        f"dropped/environment {end}" for end in ("raised LookupError", "gave no answer in 1.5 s")
    )
    # Twenty-four prompts in four steps of six: each of them was asked once.
    assert summary.get(raised, 0) + summary.get(silent, 0) > 0
    reasons = Counter(row["left_out"] for row in rows if row["left_out"])
    assert all(row["left_out"] is None or row["reward"] is None for row in rows), reasons
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
    assert [row["step"] for row in metrics] == list(range(4))
    assert any(row["turns"] > 1 for row in metrics)
