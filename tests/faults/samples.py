"""Faults of rewards and prompts: what says nothing about a completion is never scored 0."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

from tests.faults.align_run import ROOT
from tests.faults.lab import ALONE, Lab, Outcome, end_well, fault, faults


@faults(
    (
        "28",
        "rewards that are none: NaN, inf, None, text, lists, 1e309, nothing",
        "those completions are set aside with their reason; the others are learned from",
    ),
    (
        "29",
        "a reward function that raises, hangs, ends its process, and crashes it",
        "worker replaced, the group scored again; nothing is scored 0",
    ),
)
def break_rewards(lab: Lab, found: list[Outcome]) -> int:
    source = "reward={source: 'tests.faults.rewards:misbehave', timeout_s: 3, weights: {}}"
    with lab.run(*ALONE, source, "steps=3") as run:
        run.start()
        start = run.struck("raise")
        _, seconds = end_well(run, start)
        assert {"exit", "hang", "raise", "segfault"} <= {file.name for file in run.faults.iterdir()}
        summary = run.summary()
        reasons = {k: v for k, v in summary.items() if k.startswith("dropped/")}
        assert any("nan" in reason for reason in reasons), reasons
        assert all(abs(row["reward/total"]) < 2 for row in run.metrics())
        found.append(Outcome(None, None, f"{len(reasons)} reasons, all counted"))
        rows = [json.loads(line) for line in (run.done / "rollouts.jsonl").read_text().splitlines()]
        scored = [row["reward"] for row in rows if row.get("reward") is not None]
        assert scored and min(scored) > 0, "something was scored 0"
        restarts = max(row["restarts/reward"] for row in run.metrics())
        note = f"{restarts:.0f} workers replaced; {len(scored)} of {len(rows)} have a reward"
        found.append(Outcome(None, seconds, note))
        return run.lost()


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
        end = run.start().finish()
        assert end.status == 2 and "long.jsonl:2: prompt of 72 tokens" in end.last, end.last
        return Outcome(None, None, end.last)


@fault(
    "9b",
    "a file of prompts that is not UTF-8",
    "refused by line before anything starts",
)
def foreign_prompts(lab: Lab) -> Outcome:
    prompts = lab.root / "latin.jsonl"
    prompts.write_bytes(
        b'{"prompt": "w1", "reference": "1"}\n{"prompt": "caf\xe9", "reference": "1"}\n'
    )
    with lab.run(f"prompts={prompts}") as run:
        end = run.start().finish()
        assert end.status == 2 and "latin.jsonl:2: not UTF-8 (byte 0xe9)" in end.last, end.last
        return Outcome(None, None, end.last)


@fault(
    "9c",
    "completions that are empty",
    "scored as what they are, and learned from: their one token is the end",
)
def empty_completions(lab: Lab) -> Outcome:
    tiny = ("steps=2", "prompts_per_step=8", "group_size=8", "sampling={max_tokens: 1}")
    with lab.run(*ALONE, *tiny) as run:
        start = time.time()
        end_well(run.start(), start)
        rows = [json.loads(line) for line in (run.done / "rollouts.jsonl").read_text().splitlines()]
        empty = [row for row in rows if row["completion"] == ""]
        assert len(rows) == 128 and empty
        assert all(row["reward"] == 0 for row in empty)
        return Outcome(None, None, f"{len(empty)} of {len(rows)} were empty", run.lost())


@fault(
    "31",
    "completions whose code attacks: connections, files, processes, memory, forged verdicts",
    "all held by the sandbox; the next sample is judged as ever",
)
def attack_sandbox(lab: Lab) -> Outcome:
    command = [sys.executable, "-m", "pytest", "tests/rewards/test_sandbox.py", "-rs"]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout[-2000:]
    assert "kernel cannot confine" not in done.stdout, "nothing was tried on this kernel"
    seconds = time.monotonic() - start
    note = f"{passed[1]} tests of tests/rewards/test_sandbox.py in {seconds:.0f} s, 0 escapes"
    return Outcome(None, None, note)
