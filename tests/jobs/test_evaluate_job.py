"""The evaluate and report jobs on a run with two tiny models, under real Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jobs import evaluate, report
from raylign.config import EvaluateConfig, Recipe, UserError
from raylign.run import Run
from raylign.tracking import ProgressBoard

FAST = {"backend": "transformers", "max_tokens": 4, "kv_cache_mb": 64}


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Run:
    """A corpus with held-out data, and the tiny model as both `pretrain` and `sft`."""
    run = Run(tmp_path / "run")
    with run.write("corpus", {}, {}) as draft:
        rows = [
            {"id": str(i), "prompt": f"w{i} w{i + 1}", "reference": str(i), "key": f"{i} + 0"}
            for i in range(6)
        ]
        for name, lines in (
            ("held_out.jsonl", rows),
            ("english_held_out.jsonl", [{"text": "w1 w2 w3"}, {"text": "w4 w5"}]),
        ):
            (draft.path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for stage in ("pretrain", "sft"):
        with run.write(stage, {"stage": stage}, {}) as draft:
            shutil.copytree(tiny_model, draft.path / "model")
    return run


def evaluated(run: Run, **settings: object) -> dict:
    recipe = Recipe(run=run.root, evaluate=EvaluateConfig(**FAST | settings))
    with ProgressBoard() as board:
        evaluate.run(recipe, run, board)
    return json.loads((run.root / "evaluate" / "results.json").read_text())


@pytest.mark.slow
def test_models_stand_side_by_side_and_are_reported(run: Run, ray_cluster: None) -> None:
    results = evaluated(run)
    assert results["models"] == ["base", "sft"]
    exact = results["tasks"]["arithmetic"]["metric"]["exact"]
    assert exact["base"] == exact["sft"] == {"value": 0.0, "stderr": 0.0, "n": 6}
    bits = results["tasks"]["english"]["metric"]["bits_per_byte"]
    assert bits["base"]["value"] == bits["sft"]["value"] > 0
    questions = [row["question"] for row in results["answers"]["base"]]
    assert questions == [f"w{i} w{i + 1}" for i in range(6)]
    assert {(d["from"], d["to"], d["value"]) for d in results["differences"]} == {
        ("base", "sft", 0.0)
    }
    parents = run.require("evaluate", "evaluate").manifest.parents
    assert set(parents) == {"pretrain", "sft", "corpus"}

    for _ in range(2):  # always rebuilt
        with ProgressBoard() as board:
            report.run(Recipe(run=run.root), run, board)
    page = (run.root / "report" / "report.html").read_text()
    assert "Before and after" in page and "Reinforcement learning settings" not in page


@pytest.mark.slow
def test_vllm_in_a_worker_agrees_with_transformers(
    run: Run, tiny_model: Path, ray_cluster: None
) -> None:
    served = evaluated(run, backend="vllm", models={"mine": tiny_model})
    config = EvaluateConfig(**FAST)
    plain = evaluate.evaluate_directory(tiny_model, run.root / "corpus", config, seed=0)
    written = [row["answer"] for row in served["answers"]["mine"]]
    assert written == [row["answer"] for row in plain["documents"]["arithmetic"]]
    for metric, score in plain["metrics"]["english"].items():
        value = served["tasks"]["english"]["metric"][metric]["mine"]["value"]
        assert value == pytest.approx(score["value"], rel=1e-4)


@pytest.mark.slow
def test_a_mistake_found_by_a_worker_is_one_line(run: Run, ray_cluster: None) -> None:
    with pytest.raises(UserError) as caught:
        evaluated(run, tasks=("arithmetics",))
    assert str(caught.value).startswith("evaluate.tasks: unknown task 'arithmetics'; did you mean")
    assert "\n" not in str(caught.value)
    assert run.find("evaluate") is None


def test_mistakes_are_found_before_workers_start(
    run: Run, tmp_path: Path, ray_cluster: None
) -> None:
    with pytest.raises(UserError, match=r"evaluate\.models\.mine=.*no such directory"):
        evaluated(run, models={"mine": tmp_path / "absent"})
    with pytest.raises(UserError, match=r"evaluate\.cpus=99: the cluster has 2 CPU"):
        evaluated(run, cpus=99)
    with pytest.raises(UserError, match="has no model to evaluate"):
        evaluated(Run(tmp_path / "empty"))


def test_nothing_to_report_is_said(tmp_path: Path) -> None:
    run = Run(tmp_path / "empty")
    with pytest.raises(UserError, match="no finished stage to report on"), ProgressBoard() as board:
        report.run(Recipe(run=run.root), run, board)
