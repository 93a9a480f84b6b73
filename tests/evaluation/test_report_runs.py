"""Several runs side by side: their curves in one chart, their held-out results in one table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs import report
from raylign.config import ConfigError, Recipe, UserError, load_recipe
from raylign.evaluation.report import build_report
from raylign.run import Run, write_json
from raylign.tracking import ProgressBoard, append_rows


def make_run(
    root: Path, seed: int, rewards: list[float], scores: dict[str, float], task: str = "arithmetic"
) -> Path:
    run = Run(root)
    with run.write("align", {"seed": seed}, {}) as draft:
        rows: list[dict[str, Any]] = [
            {"step": step, "reward/total": reward, "kl": 0.1 * seed}
            for step, reward in enumerate(rewards)
        ]
        append_rows(draft.path / "metrics.jsonl", rows)
    if scores:
        measured = {m: {"value": v, "stderr": 0.01, "n": 200} for m, v in scores.items()}
        results = {"models": list(scores), "tasks": {task: {"metric": {"exact": measured}}}}
        with run.write("evaluate", {}, {}) as draft:
            write_json(draft.path / "results.json", results)
    return root


def make_three(tmp_path: Path) -> dict[str, Path]:
    scores = [(0.25, 0.5), (0.3, 0.7), (0.2, 0.9)]
    return {
        f"seed {n}": make_run(tmp_path / str(n), n, [0.1, 0.2 * n, 0.3 * n], {"sft": a, "rl": b})
        for n, (a, b) in enumerate(scores)
    }


def test_three_seeds_share_charts_and_a_table(tmp_path: Path) -> None:
    first, *rest = make_three(tmp_path).items()
    numbers = build_report(first[1], tmp_path / "out", {}, dict(rest), first[0])
    assert "runs" in numbers["sections"]
    assert numbers["runs"]["seed 2"]["rewards"] == [0.1, 0.4, 0.6]
    assert [run["seed"] for run in numbers["runs"].values()] == [0, 1, 2]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## 3 runs side by side" in text and "for their seeds differ" in text
    assert "| seed 1 | ▁▅█ | 0.1 | 0.3 |" in text and "**KL to the reference.**" in text
    assert "Entropy" not in text  # nobody measured it
    # Of the three values: mean and the standard deviation of a sample, by hand.
    assert "| SFT | 25.0% (± 1.0) | 30.0% (± 1.0) | 20.0% (± 1.0) | 25.0% (± 5.0) |" in text
    assert "| RL | 50.0% (± 1.0) | 70.0% (± 1.0) | 90.0% (± 1.0) | 70.0% (± 20.0) |" in text
    assert "| SFT → RL | +25.0 | +40.0 | +70.0 | +45.0 (± 22.9) |" in text
    page = (tmp_path / "out" / "report.html").read_text()
    section = page.partition('<section id="runs">')[2].partition("</section>")[0]
    reward = section.partition("<h3>Reward</h3>")[2].partition("</figure>")[0]
    assert reward.count("<polyline") == reward.count('class="key"') == 3


def test_a_run_that_lacks_something_leaves_a_gap(tmp_path: Path) -> None:
    runs = make_three(tmp_path)
    bare = make_run(tmp_path / "bare", 0, [0.5], {})
    build_report(runs["seed 1"], tmp_path / "out", {}, {"<blink>": bare, "none": runs["seed 0"]})
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| RL | 70.0% (± 1.0) | n/a | 50.0% (± 1.0) | 60.0% (± 14.1) |" in text
    assert "or what was set otherwise" in text  # two of them have seed 0
    assert "<blink>" not in (tmp_path / "out" / "report.html").read_text().partition("<body>")[2]
    shutil.rmtree(bare / "align")
    with pytest.raises(UserError, match=r"report\.runs\.x=.*bare has neither a finished align"):
        build_report(runs["seed 1"], tmp_path / "out", {}, {"x": bare})


def test_a_report_alone_has_no_such_section(tmp_path: Path) -> None:
    numbers = build_report(make_three(tmp_path)["seed 0"], tmp_path / "out")
    assert "runs" not in numbers["sections"] and numbers["runs"] == {}


def make_recipe(root: Path, **given: Any) -> Recipe:
    return Recipe.model_validate({"run": root, "report": given})


def test_the_job_takes_further_runs(tmp_path: Path) -> None:
    runs = make_three(tmp_path)
    own = runs.pop("seed 0")
    with ProgressBoard() as board:
        report.run(make_recipe(own, runs=runs, name="seed 0"), Run(own), board)
    made = Run(own).require("report", "report").manifest
    assert made.parents.keys() >= {"align", "seed 1/align", "seed 2/evaluate"}
    numbers = json.loads((own / "report" / "report.json").read_text())
    assert list(numbers["runs"]) == ["seed 0", "seed 1", "seed 2"]


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ({"b": "nowhere"}, r"report\.runs\.b=.*nowhere: no such directory"),
        ({"b": "0"}, r"report\.runs\.b=.* is the run itself"),
        ({"0": "1"}, r"report\.runs\.0: the run itself is called so; give report\.name"),
    ],
)
def test_what_is_no_further_run_is_said(tmp_path: Path, runs: dict[str, str], said: str) -> None:
    own = make_three(tmp_path)["seed 0"]
    recipe = make_recipe(own, runs={name: tmp_path / place for name, place in runs.items()})
    with ProgressBoard() as board, pytest.raises(UserError, match=said):
        report.run(recipe, Run(own), board)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("report.name=a", "name has no effect without runs"),
        ("report={runs: {a: runs/a}, name: a}", "one of runs is called that already"),
    ],
)
def test_a_name_must_say_something(tmp_path: Path, given: str, said: str) -> None:
    (tmp_path / "r.yaml").write_text(f"run: {tmp_path}\n")
    with pytest.raises(ConfigError, match=said):
        load_recipe(tmp_path / "r.yaml", [given])


@pytest.mark.parametrize(
    ("task", "said"),
    [("arithmetic", "arithmetic problems"), ("episodes", "problems, in episodes")],
)
def test_the_headline_says_what_was_answered(tmp_path: Path, task: str, said: str) -> None:
    run = make_run(tmp_path / "run", 0, [0.1, 0.2], {"sft": 0.25, "rl": 0.5}, task)
    build_report(run, tmp_path / "out", {})
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"Correct answers to 200 held-out {said}" in text
