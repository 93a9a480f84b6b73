"""A search on real Ray Tune: trials, the best one kept, an interrupt survived, bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from jobs import tune
from jobs.intent import TRIALS, perform_search
from jobs.tune import StageTrial, begin_copy, check_values, find_attempt, offer_checkpoint
from raylign.config import ConfigError, Recipe, UserError, load_recipe
from raylign.models.loading import load_model
from raylign.run import Draft, Run
from raylign.tracking import ProgressBoard, read_lines
from raylign.training.checkpoints import list_checkpoints, name_step
from raylign.training.loop import CHECKPOINTS
from raylign.training.tuning import (
    EXPERIMENT,
    SearchError,
    Trial,
    best_trial,
    check_search,
    count_trials,
    search,
)

ROOT = Path(__file__).resolve().parents[2]


def write_recipe(
    directory: Path, model: Path, training: Mapping[str, Any] | None = None, **changes: Any
) -> Path:
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
        }
        | (training or {}),
        "tune": search | changes,
    }
    file = directory / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def searched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search that was interrupted once on the way; its recipe."""
    directory = tmp_path_factory.mktemp("tune")
    # The data's path is relative to where the command is given.
    recipe = write_recipe(directory, tiny_model, {"data": "data.jsonl"}, concurrent=1)
    command = [sys.executable, "-m", "jobs.tune", recipe.name]
    environment = {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    first = subprocess.Popen(
        command, cwd=directory, env=_environ(environment), stderr=subprocess.PIPE, text=True
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
        [*command, "tune.cpus=0.4", "sft.engine.timeout_s=90"],  # may differ
        cwd=directory,
        env=_environ(environment),
        capture_output=True,
        text=True,
        timeout=400,
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
    assert all(row["seconds"] > 0.5 for row in rows), "also of those that were finished before"
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


@pytest.mark.slow
def test_a_copied_trial_goes_on_from_the_better_ones_weights(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    """Two trials, one of which cannot learn anything: it becomes a copy of the other."""
    # Wide batches: a third of the steps takes longer than one trial starts before the other.
    training = {"steps": 120, "checkpoint_every": 20, "batch_size": 96, "sample_prompts": []}
    space = {"optimizer.lr": [1e-9, 1e-2]}
    changes = {"space": space, "scheduler": "pbt", "grace_steps": 40, "cpus": 0.4, "metric": "loss"}
    recipe = make_recipe(tmp_path, tiny_model, training=training, **changes)
    assert recipe.tune is not None
    function = StageTrial(recipe, recipe.tune, tmp_path / "run")
    for attempt in range(3):  # one that is over before the other begins is not copied
        storage = tmp_path / f"trials-{attempt}"
        trials = search(function, recipe.tune, 120, storage, seed=0)
        assert [trial.status for trial in trials] == ["finished"] * 2, trials
        copy = find_attempt(storage / trials[0].name)
        if copy.name.startswith("copy-"):
            break
    assert copy.name.startswith("copy-"), "the first one is the one that learns nothing"
    [started] = [row for row in read_lines(copy / "sft/events.jsonl") if row["what"] == "started"]
    assert started["step"] >= 20 and started["step"] % 20 == 0
    first, *_, last = read_lines(copy / "sft/metrics.jsonl")
    assert first["step"] == started["step"] + 10 and last["step"] == 120
    # Of 57 words it would know nothing otherwise, and had learnt nothing before.
    own = (storage / EXPERIMENT / trials[0].name / "result.json").read_text("utf-8").splitlines()
    before = [row["loss"] for row in map(json.loads, own) if row["step"] <= started["step"]]
    assert before[0] > 3.5 and first["loss"] < before[0] - 1
    assert not (copy.parent / "sft").exists() and not (copy.parent / ".sft.partial").exists()


def make_attempt(tmp_path: Path, *steps: int) -> Path:
    """A trial in the making that has saved checkpoints at `steps`."""
    store = tmp_path / "trial" / ".sft.partial" / CHECKPOINTS
    for step in steps:
        (store / name_step(step) / "hf").mkdir(parents=True)
        (store / name_step(step) / "hf" / "weights").write_text(f"{step}")
    return tmp_path / "trial"


def test_a_checkpoint_that_is_offered_stays_when_the_trial_removes_its_own(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, 2, 4)
    offered = offer_checkpoint(attempt, "sft", 4)
    assert offered is not None
    for path in list_checkpoints(attempt / ".sft.partial" / CHECKPOINTS):
        own = (path / "hf" / "weights").stat()
        shutil.rmtree(path)
    assert (offered / "hf" / "weights").read_text() == "4"
    assert (offered / "hf" / "weights").stat().st_ino == own.st_ino, "nothing was copied"


def test_a_row_waits_for_its_checkpoint_as_long_as_there_may_be_one(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, 2)
    draft = attempt / ".sft.partial"
    thread = threading.Timer(0.3, lambda: make_attempt(tmp_path, 4))
    thread.start()
    offered = offer_checkpoint(attempt, "sft", 4)
    assert offered is not None and (offered / "hf" / "weights").read_text() == "4"
    # A later one does as well; one that failed is not waited for, nor one of a stage that is whole.
    assert offer_checkpoint(attempt, "sft", 3) == offered
    (draft / "events.jsonl").write_text('{"what": "checkpoint_failed", "step": 6}\n')
    assert offer_checkpoint(attempt, "sft", 6) is None
    draft.rename(attempt / "sft")
    assert offer_checkpoint(attempt, "sft", 8) is None


def test_a_copy_has_a_run_directory_of_its_own(tmp_path: Path) -> None:
    trial = make_attempt(tmp_path, 2)
    assert find_attempt(trial) == trial
    first = begin_copy(trial, "sft")
    assert find_attempt(trial) == first and not (trial / ".sft.partial").exists()
    (first / "sft").mkdir()
    second = begin_copy(trial, "sft")
    assert find_attempt(trial) == second != first and not (first / "sft").exists()


def test_a_metric_that_is_not_there_is_told_at_the_first_checkpoint(
    tmp_path: Path, tiny_model: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_model, metric="valdation_loss")
    assert recipe.tune is not None
    trial = StageTrial(recipe, recipe.tune, tmp_path)
    attempt = make_attempt(tmp_path, 2)
    rows = attempt / ".sft.partial" / "metrics.jsonl"
    rows.write_text('{"step": 1, "time": 0, "loss": 4}\n')
    reported: list[Any] = []
    assert trial._report_new(attempt, recipe, 0, 5, lambda *row: reported.append(row)) == 0
    with rows.open("a") as stream:
        stream.write('{"step": 2, "time": 0, "loss": 3, "validation_loss": 4}\n')
    with pytest.raises(SearchError) as caught:
        trial._report_new(attempt, recipe, 0, 5, lambda *row: reported.append(row))
    assert not reported and str(caught.value) == (
        "tune.metric=valdation_loss is no column of the trials' metrics; choose from loss, "
        "validation_loss"
    )


@pytest.mark.slow
def test_what_one_trial_finds_out_ends_the_search(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    config = make_recipe(tmp_path, tiny_model, concurrent=1).tune
    assert config is not None
    calls = tmp_path / "calls"

    def refuse(values: Any, directory: Path, report: Any, donor: Any) -> None:
        with calls.open("a") as stream:
            stream.write("x")
        raise SearchError("tune.metric=x is no column")

    with pytest.raises(SearchError, match="is no column"):
        search(refuse, config, 6, tmp_path / "trials", 0)
    assert calls.read_text() == "x", "the second one is not tried"


def test_what_a_search_depends_on_must_stay(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    """An unfinished search goes on with other resources, and not with other trials."""
    run = Run(tmp_path / "run")
    board = ProgressBoard(Console(quiet=True))

    def attempt(outcome: type[BaseException], training: Any = None, **changes: Any) -> None:
        recipe = make_recipe(tmp_path, tiny_model, training=training, **changes)
        assert recipe.tune is not None and recipe.sft is not None

        def build(draft: Draft) -> None:
            rows = draft.path / TRIALS / "t_00000" / "sft" / "metrics.jsonl"
            rows.parent.mkdir(parents=True, exist_ok=True)
            rows.touch()
            raise KeyboardInterrupt

        with pytest.raises(outcome) as caught:
            perform_search(run, recipe.tune, recipe.sft, 0, {}, board, build)
        if outcome is UserError:
            assert "(trials: 1)" in str(caught.value) and "redo=tune" in str(caught.value)

    attempt(KeyboardInterrupt)
    attempt(KeyboardInterrupt, concurrent=1, cpus=0.25)
    attempt(KeyboardInterrupt, {"micro_batch_size": 2, "engine": {"timeout_s": 90.0}})
    attempt(UserError, {"checkpoint_every": 3})
    attempt(UserError, {"steps": 12})
    attempt(UserError, metric="loss")


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
        ({"scheduler": "pbt", "concurrent": 1}, "tune.concurrent=1 is less than the 2 trials"),
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
