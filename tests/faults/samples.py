"""Faults of rewards and prompts: what says nothing about a completion is never scored 0."""

from __future__ import annotations

import json
import time

from tests.faults.lab import Lab, Outcome, end_well, fault


@fault(
    "28",
    "rewards that are none: NaN, inf, None, text, lists, 1e309, nothing",
    "those completions are set aside with their reason; the others are learned from",
)
def poison_rewards(lab: Lab) -> Outcome:
    with lab.run("reward={source: 'tests.faults.rewards:poison', weights: {}}", "steps=2") as run:
        start = time.time()
        end_well(run.start(), start)
        summary = run.summary()
        reasons = sorted(k for k in summary if k.startswith("dropped/"))
        assert any("nan" in reason for reason in reasons), reasons
        rows = [json.loads(line) for line in (run.done / "metrics.jsonl").read_text().splitlines()]
        assert all(abs(row["reward/total"]) < 2 for row in rows)
        return Outcome(None, None, run.lost(), f"{len(reasons)} reasons, all counted")


@fault(
    "29",
    "a reward function that raises, hangs, ends its process, and crashes it",
    "worker replaced, the group scored again; nothing is scored 0",
)
def break_rewards(lab: Lab) -> Outcome:
    place = lab.root / f"breaks-{time.time_ns()}"
    place.mkdir()
    with lab.run(
        "reward={source: 'tests.faults.rewards:break_down', timeout_s: 3}", "steps=3"
    ) as run:
        start = time.time()
        run.start(RAYLIGN_FAULT_DIRECTORY=str(place))
        _, seconds = end_well(run, start)
        assert sorted(file.name for file in place.iterdir()) == [
            "exit",
            "hang",
            "raise",
            "segfault",
        ]
        summary = run.summary()
        dropped = {k: v for k, v in summary.items() if k.startswith("dropped/")}
        rows = [json.loads(line) for line in (run.done / "rollouts.jsonl").read_text().splitlines()]
        scored = [row["reward"] for row in rows if row.get("reward") is not None]
        assert scored and min(scored) > 0, "something was scored 0"
        return Outcome(None, seconds, run.lost(), f"dropped: {dropped}")


@fault(
    "9",
    "prompts that do not fit",
    "refused by line before anything starts",
)
def long_prompt(lab: Lab) -> Outcome:
    prompts = lab.root / "long.jsonl"
    rows = [{"prompt": "w1", "reference": "1"}, {"prompt": " ".join(["w1"] * 70), "reference": "1"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with lab.run(f"prompts={prompts}") as run:
        end = run.start().finish(60)
        assert end.status == 2 and "long.jsonl:2: prompt of 72 tokens" in end.last, end.last
        return Outcome(None, None, 0, end.last)
