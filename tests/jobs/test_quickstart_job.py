"""The whole journey in miniature, as a user runs it: real Ray, DeepSpeed, vLLM and lm-eval."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from raylign.run import Run, verify
from raylign.tracking import read_lines

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
RECIPE = Path(__file__).with_name("miniature.yaml")
DATA = ("documents", "signals", "signatures", "corpus", "tokenizer", "shards", "data_report")
STAGES = (*DATA, "pretrain", "sft", "align", "evaluate")


def launch(job: str, *arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"jobs.{job}", str(RECIPE), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "RAYLIGN_TEST_MARK": "journey"},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == status, output[-3000:]
    return output


def marked_processes(mark: str) -> list[psutil.Process]:
    """Processes that inherited this test's environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAYLIGN_TEST_MARK") == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("journey") / "run"
    finish(launch("quickstart", f"run={root}"))
    return Run(root)


def test_every_stage_is_whole_and_descends_from_the_corpus(journey: Run) -> None:
    stages = {name: journey.find(name) for name in STAGES}
    for name, stage in stages.items():
        assert stage is not None, name
        assert verify(stage) == [], name
    content = {name: stage.manifest.content for name, stage in stages.items() if stage}
    for child, parent in [
        ("signals", "documents"),
        ("signatures", "documents"),
        ("corpus", "signals"),
        ("corpus", "signatures"),
        ("tokenizer", "corpus"),
        ("shards", "tokenizer"),
        ("pretrain", "shards"),
        ("sft", "pretrain"),
        ("align", "sft"),
    ]:
        assert content[parent] in stages[child].manifest.parents.values(), (child, parent)  # type: ignore[union-attr]


def test_every_version_was_proved_by_every_worker(journey: Run) -> None:
    events = read_lines(journey.root / "align" / "events.jsonl")
    syncs = [e for e in events if e["what"] == "sync" and e["actor"] != "learner"]
    for worker in ("rollout-0", "rollout-1"):
        assert [e["version"] for e in syncs if e["actor"] == worker] == [0, 1, 2, 3]
    assert all(e["canary_error"] < 1e-4 for e in syncs)
    assert len({e["checksum"] for e in syncs}) == 4  # one a version


def test_every_step_reports_mismatch_staleness_and_no_loss_of_samples(journey: Run) -> None:
    metrics = read_lines(journey.root / "align" / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2]
    for m in metrics:
        assert m["mismatch/mean_abs"] < 1e-3 and m["mismatch/unchecked"] == 0
        assert m["staleness/max"] <= 1
        assert m["samples"] + sum(v for k, v in m.items() if k.startswith("dropped/")) == 16
    assert metrics[2]["staleness/max"] == 1  # step 2 began while step 1 was being learned


def test_three_models_are_compared(journey: Run) -> None:
    results = json.loads((journey.root / "evaluate" / "results.json").read_text())
    assert results["models"] == ["base", "sft", "rl"]
    for task in ("arithmetic", "english"):
        for values in results["tasks"][task]["metric"].values():
            assert set(values) == {"base", "sft", "rl"}


def test_the_report_is_there_and_tells_time_and_memory(journey: Run) -> None:
    page = (journey.root / "report" / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")
    told = json.loads((journey.root / "journey.json").read_text())
    assert told["seconds"] > 0 and 0 < told["peak_memory_gb"] < 12


def test_models_load_anywhere(journey: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for stage in ("pretrain", "sft", "align"):
        directory = journey.root / stage / "model"
        model = AutoModelForCausalLM.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert model.config.vocab_size == len(tokenizer) and tokenizer.chat_template


def test_a_rerun_changes_nothing_and_starts_no_cluster(journey: Run) -> None:
    before = {name: (journey.root / name / "manifest.json").stat().st_mtime_ns for name in STAGES}
    started = time.monotonic()
    output = finish(launch("quickstart", f"run={journey.root}"))
    after = {name: (journey.root / name / "manifest.json").stat().st_mtime_ns for name in STAGES}
    assert before == after
    assert output.count("already done") == len(STAGES)
    assert time.monotonic() - started < 120


def test_other_settings_are_refused_not_mixed(journey: Run) -> None:
    output = finish(launch("sft", f"run={journey.root}", "sft.steps=7"), status=2)
    error = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "sft.steps=6, not 7" in error[0] and "redo=sft" in error[0]


def test_an_interrupted_alignment_goes_on_where_it_was_and_takes_turns(
    journey: Run, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(journey.root, root)
    settings = (
        f"run={root}",
        "align.steps=8",
        "align.max_staleness=0",
        "align.rollout.count=1",
        "align.reward.source=tests.jobs.user_rewards:misbehave",
    )
    process = launch("quickstart", *settings, "redo=align")
    partial = root / ".align.partial" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (partial.is_file() and partial.read_text().count("\n") >= 1):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    output = finish(process, status=130)
    assert "rerun to continue" in output
    for _ in range(100):
        if not marked_processes("journey"):
            break
        time.sleep(0.1)
    assert marked_processes("journey") == []
    left = Run(root)
    assert left.find("sft") is not None and left.find("align") is None
    assert not (root / "align").exists()
    done = [row["step"] for row in read_lines(partial)]
    assert done == list(range(len(done))) and len(done) < 8
    finish(launch("align", *settings))
    rows = read_lines(root / "align" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(8))
    events = read_lines(root / "align" / "events.jsonl")
    resumed = [row["step"] for row in events if row["what"] == "resumed"]
    assert len(resumed) == 1 and resumed[0] >= len(done)
    check_turns(rows, events)
    summary = Run(root).require("align", "align").manifest.summary
    dropped = sum(count for name, count in summary.items() if name.startswith("dropped/"))
    assert summary["dispatched"] == 8 * 16 == summary["trained"] + dropped


def check_turns(rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
    """Nothing is sampled before the last step is learned; what a reward function does wrong is
    counted, and left out."""
    assert all(row["staleness/max"] == 0 for row in rows)
    learned: dict[int, float] = {}
    for event in events:
        if event["what"] == "learn":
            learned.setdefault(event["step"], event["end"])
    for event in events:
        if event["what"] == "generate" and event["step"] > 0:
            assert event["start"] > learned[event["step"] - 1]
    reasons = {name for row in rows for name in row if name.startswith("dropped/")}
    assert {
        "dropped/reward raised ZeroDivisionError",
        "dropped/reward part correct is nan",
    } <= reasons
    for row in rows:
        lost = sum(count for name, count in row.items() if name.startswith("dropped/"))
        assert row["samples"] + lost == 16
