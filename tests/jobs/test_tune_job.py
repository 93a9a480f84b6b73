"""A search on real Ray Tune: trials, the best one kept, an interrupt survived, bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import tune
from jobs.tune import check_values
from raylign.config import ConfigError, Recipe, UserError, load_recipe
from raylign.models.loading import load_model
from raylign.run import Run
from raylign.tracking import ProgressBoard, read_lines
from raylign.training.tuning import Trial, best_trial, check_search, count_trials

ROOT = Path(__file__).resolve().parents[2]


def write_recipe(directory: Path, model: Path, **changes: Any) -> Path:
    """A search of two learning rates over six steps of fine-tuning on sums of words."""
    data = directory / "data.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"w{n} w{n + 1}"},
                {"role": "assistant", "content": f"w{n + 2}"},
            ]
        }
        for n in range(40)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    search = {
        "stage": "sft",
        "space": {"optimizer.lr": [1.0e-5, 1.0e-2]},
        "search": "grid",
        "scheduler": "none",
        "cpus": 0.5,
    }
    recipe = {
        "run": str(directory / "run"),
        "ray": {"num_cpus": 2},
        "sft": {
            "model": str(model),
            "data": str(data),
            "steps": 6,
            "batch_size": 4,
            "micro_batch_size": 4,
            "sequence_length": 32,
            "checkpoint_every": 2,
            "sample_prompts": ["w1 w2"],
            "sample_tokens": 3,
            "engine": {"backend": "torch"},
            "workers": {"count": 1},
        },
        "tune": search | changes,
    }
    file = directory / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def searched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search that was interrupted once on the way; its recipe."""
    directory = tmp_path_factory.mktemp("tune")
    recipe = write_recipe(directory, tiny_model, concurrent=1)
    command = [sys.executable, "-m", "jobs.tune", str(recipe)]
    environment = {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    first = subprocess.Popen(
        command, cwd=ROOT, env=_environ(environment), stderr=subprocess.PIPE, text=True
    )
    trials = directory / "run/.tune.partial/.trials"
    deadline = time.monotonic() + 300
    while not list(trials.glob("*/sft/manifest.json")):
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline, "no trial finished"
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    message = first.communicate(timeout=60)[1]
    assert first.returncode == 130, message
    done = subprocess.run(
        command, cwd=ROOT, env=_environ(environment), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return recipe


def _environ(more: dict[str, str]) -> dict[str, str]:
    import os

    return os.environ | more


@pytest.mark.slow
def test_the_better_trial_is_kept_with_its_recipe(searched: Path) -> None:
    stage = Run(searched.parent / "run").require("tune", "tune")
    rows = read_lines(stage.path / "trials.jsonl")
    assert [row["values"] for row in rows] == [{"optimizer.lr": 1e-2}, {"optimizer.lr": 1e-5}]
    assert [row["best"] for row in rows] == [True, False]
    assert rows[0]["metric"] < rows[1]["metric"]
    assert all(row["status"] == "finished" and row["step"] == 6 for row in rows)
    best = load_recipe(stage.path / "best.yaml")
    assert best.sft is not None and best.sft.optimizer.lr == 1e-2 and best.tune is None
    assert load_model(stage.path / "best/model").num_parameters() == rows[0]["parameters"]
    assert "0.01" in (stage.path / "trials.md").read_text("utf-8")
    assert (stage.path / "trials.svg").read_text("utf-8").count("<svg") == 1
    assert "## w1 w2" in (stage.path / "samples.md").read_text("utf-8")
    assert not (stage.path / ".trials").exists()


@pytest.mark.slow
def test_what_was_done_before_the_interrupt_is_not_done_again(searched: Path) -> None:
    rows = read_lines(searched.parent / "run/tune/trials.jsonl")
    curves = [[step for step, value in row["curve"] if value is not None] for row in rows]
    assert curves == [[2, 4, 6], [2, 4, 6]]
    assert len({row["name"].rpartition("_")[0] for row in rows}) == 1, "one search, continued"


def make_recipe(tmp_path: Path, tiny_model: Path, **changes: Any) -> Recipe:
    return load_recipe(write_recipe(tmp_path, tiny_model, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "tune.space is empty"),
        ({"space": {"optimizer.lr": []}}, "tune.space.optimizer.lr is an empty list"),
        ({"space": {"optimizer.lr": {"low": 1, "high": 2}}}, "is a range, and a grid needs lists"),
        (
            {"search": "random", "space": {"optimizer.lr": {"low": 2, "high": 1}}},
            "low=2 must be below high=1",
        ),
        ({"scheduler": "pbt", "space": {"adapter.rank": [2, 4]}}, "cannot change while a model"),
    ],
)
def test_an_impossible_search_is_refused(
    tmp_path: Path, tiny_model: Path, changes: dict[str, Any], message: str
) -> None:
    recipe = make_recipe(tmp_path, tiny_model, **changes)
    assert recipe.tune is not None
    with pytest.raises(UserError, match=message):
        check_search(recipe.tune)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optimiser.lr": [1e-3]}, "tune.space.optimiser.lr: unknown key 'sft.optimiser'; did you"),
        ({"optimizer.lr": [1e-3, -1]}, "tune.space.optimizer.lr: sft.optimizer.lr=-1: input"),
    ],
)
def test_values_are_tried_on_the_stage_before_anything_runs(
    tmp_path: Path, tiny_model: Path, space: dict[str, Any], message: str
) -> None:
    recipe = make_recipe(tmp_path, tiny_model, space=space)
    assert recipe.tune is not None
    with pytest.raises(ConfigError) as caught:
        check_values(recipe, recipe.tune)
    assert str(caught.value).startswith(message)


def test_trials_are_compared_at_equal_steps(tmp_path: Path, tiny_model: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_model, space={"steps": [3, 6]})
    with ProgressBoard() as board, pytest.raises(UserError, match="tune compares trials at equal"):
        tune.run(recipe, Run(tmp_path / "run"), board)


def test_the_grid_is_counted(tmp_path: Path, tiny_model: Path) -> None:
    recipe = make_recipe(
        tmp_path, tiny_model, space={"optimizer.lr": [1e-3, 1e-2], "adapter.rank": [2, 4, 8]}
    )
    assert recipe.tune is not None and count_trials(recipe.tune) == 6


def test_the_best_is_a_finished_one(tmp_path: Path, tiny_model: Path) -> None:
    config = make_recipe(tmp_path, tiny_model).tune
    assert config is not None
    trials = [
        Trial("a", {}, "stopped", 0.1, 2, 1.0),
        Trial("b", {}, "finished", 0.5, 6, 1.0),
        Trial("c", {}, "finished", 0.4, 6, 1.0),
        Trial("d", {}, "failed", float("nan"), 0, 1.0, "out of luck"),
    ]
    assert best_trial(trials, config).name == "c"
    assert best_trial(trials, config.model_copy(update={"goal": "max"})).name == "b"
    with pytest.raises(UserError, match=r"none of 1 trials finished .*: out of luck"):
        best_trial(trials[3:], config)
