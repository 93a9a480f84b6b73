"""Search over a training stage: `python -m jobs.tune recipe.yaml [tune.key=value ...]`.

Every trial is the stage's own job, in a run directory of its own that sees the stages before it.
Writes the `tune` stage: a table and a plot of all trials, what each of them says to the sample
prompts, the best one's model or adapter in `best/`, and the recipe that makes it in `best.yaml`.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from jobs import tune_alignment
from jobs.align_journal import EXAMPLES_FILE
from jobs.entry import STAGES, main, section
from jobs.intent import TRIALS, perform_search
from jobs.trials import TrialRow, draw_trials, show_samples, tabulate, write_trials
from raylign.config import (
    AlignConfig,
    RangeConfig,
    Recipe,
    TrainingConfig,
    TuneConfig,
    UserError,
    change,
)
from raylign.run import Draft, Run
from raylign.runtime import derive_seed, disconnect
from raylign.tracking import EVENTS_FILE, METRICS_FILE, ProgressBoard, read_lines
from raylign.training.checkpoints import list_checkpoints, name_step
from raylign.training.loop import CHECKPOINTS
from raylign.training.sampling import SAMPLES_FILE
from raylign.training.tuning import (
    Report,
    SearchError,
    Trial,
    best_trial,
    check_search,
    count_trials,
    search,
)

POLL_S = 0.5
SAVED_S = 60.0  # longest wait for a checkpoint to go with a row
# Below a trial's directory: a run directory for each time that it went on as a copy.
COPY = "copy-{:04d}"
OFFER = ".offer"


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `tune` stage."""
    config = section(recipe, "tune", TuneConfig)
    stage: AlignConfig | TrainingConfig
    if config.stage == "align":
        stage = section(recipe, config.stage, AlignConfig)
    else:
        stage = section(recipe, config.stage, TrainingConfig)
    check_search(config)
    tried = check_values(recipe, config)
    steps = _planned_steps(recipe, config)
    if config.stage == "align":
        tune_alignment.check_stages(run, tried)
    before = STAGES[: STAGES.index(config.stage)]
    parents = {
        name: found.manifest.content for name in before if (found := run.find(name)) is not None
    }

    def build(draft: Draft) -> None:
        if config.stage == "align":
            own = trial_recipe(recipe, config, {}, run.root, None)
            tune_alignment.require_room(min(config.concurrent, count_trials(config)), own)
        storage = draft.path / TRIALS  # hidden, so it is no part of the finished stage
        try:
            trials = watch(recipe, config, steps, run, storage, board)
        except SearchError:
            shutil.rmtree(storage)  # nothing in it can go on
            raise
        rows = [collect(trial, storage / trial.name, config.stage) for trial in trials]
        best = best_trial(trials, config)
        keep(recipe, config, best, storage, draft)
        write_trials(rows, best.name, config, draft.path)
        draw_trials(rows, best.name, config, draft.path / "trials.svg")
        show_samples(rows, config, draft.path / "samples.md")
        counts = {status: 0 for status in ("finished", "stopped", "failed")}
        for trial in trials:
            counts[trial.status] += 1
        draft.summary.update(
            best=best.values, **{config.metric: best.metric}, trials=len(trials), **counts
        )
        board.console.print(tabulate(rows, best.name, config))

    perform_search(run, config, stage, recipe.seed, parents, board, build)


def check_values(recipe: Recipe, config: TuneConfig) -> dict[str, Recipe]:
    """The recipe with each value in turn, by what was changed; raises `UserError` for a value that
    the stage does not take."""
    found = {}
    for key, values in config.space.items():
        tried: tuple[Any, ...] = values if isinstance(values, tuple) else list_ends(values)
        for value in tried:
            place = f"tune.space.{key}"
            found[f"{place}={value}"] = change(recipe, {f"{config.stage}.{key}": value}, place)
    return found


def list_ends(values: RangeConfig) -> tuple[float, float]:
    """Smallest and largest value of a range."""
    if values.integer:
        return math.ceil(values.low), math.floor(values.high)
    return values.low, values.high


def watch(
    recipe: Recipe,
    config: TuneConfig,
    steps: int,
    run: Run,
    storage: Path,
    board: ProgressBoard,
) -> list[Trial]:
    """Search in a thread, and show how far it is: Ray Tune would take over Ctrl-C in this one."""
    outcome: dict[str, Any] = {}
    function = StageTrial(recipe, config, run.root)
    seed = derive_seed(recipe.seed, "tune")

    def explore() -> None:
        try:
            outcome["trials"] = search(function, config, steps, storage, seed)
        except BaseException as error:  # the edge of a thread: the main one raises it
            outcome["error"] = error

    thread = threading.Thread(target=explore, daemon=True)
    total = count_trials(config)
    with board.bar("tune", total, "trial") as bar:
        thread.start()
        try:
            while thread.is_alive():
                thread.join(POLL_S)
                bar.update(*_progress(storage, config, steps))
        except KeyboardInterrupt:
            disconnect()  # else trials would go on
            raise
        if "error" not in outcome:
            bar.update(total)
    if "error" in outcome:
        raise outcome["error"]
    trials: list[Trial] = outcome["trials"]
    return trials


class StageTrial:
    """One trial: the stage's job with some of its keys changed."""

    def __init__(self, recipe: Recipe, config: TuneConfig, root: Path) -> None:
        self._recipe, self._config, self._root = recipe, config, root

    def __call__(
        self, values: Mapping[str, Any], directory: Path, report: Report, donor: Path | None
    ) -> None:
        """Run the job in `directory`, and report its metrics as they appear.

        With a `donor`, training begins with that checkpoint, in a run directory of its own: ranks
        of the attempt before may still be dying, and write.
        """
        stage = self._config.stage
        attempt = directory if donor is None else begin_copy(directory, stage)
        for name in STAGES[: STAGES.index(stage)]:
            if (self._root / name).is_dir() and not (attempt / name).exists():
                os.symlink(self._root / name, attempt / name)
        recipe = trial_recipe(self._recipe, self._config, values, attempt, donor)
        planned = _planned_steps(recipe, self._config)
        if Run(attempt).find(stage) is not None:  # the search was interrupted before it knew
            self._report_new(attempt, recipe, 0, planned, report)
            return
        outcome: dict[str, BaseException] = {}

        def work() -> None:
            quiet = ProgressBoard(Console(quiet=True))
            try:
                importlib.import_module(f"jobs.{stage}").run(recipe, Run(attempt), quiet)
            except BaseException as error:  # the edge of a thread: the trial raises it
                outcome["error"] = error

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        seen = 0
        while thread.is_alive():
            thread.join(POLL_S)
            # A trial that has reported its last step may be ended; first the stage must be whole.
            seen = self._report_new(attempt, recipe, seen, planned - 1, report)
        if "error" in outcome:
            raise outcome["error"]
        self._report_new(attempt, recipe, seen, planned, report)

    def _report_new(
        self, attempt: Path, recipe: Recipe, seen: int, last: int, report: Report
    ) -> int:
        """Report the rows after step `seen` and up to `last`; the last step reported. Raises
        `SearchError` when what is compared is not among what the stage measures."""
        config, every = self._config, getattr(recipe, self._config.stage).checkpoint_every
        copied = config.scheduler == "pbt"
        for row in read_metrics(attempt, config.stage):
            step = int(row["step"])
            if not seen < step <= last:
                continue
            saved = step % every == 0 or step == _planned_steps(recipe, config)
            if saved and config.metric not in row:
                names = ", ".join(sorted(row.keys() - {"step", "time"}))
                raise SearchError(
                    f"tune.metric={config.metric} is no column of the trials' metrics; choose from "
                    f"{names}"
                )
            # A trial that is paused or copied goes on from what was reported with its last row.
            if config.metric in row and (saved or not copied):
                seen = step
                report(row, offer_checkpoint(attempt, config.stage, step) if copied else None)
        return seen


def begin_copy(directory: Path, stage: str) -> Path:
    """A run directory for a trial that goes on as a copy; what it had before is not needed."""
    copies = sorted(directory.glob("copy-*"))
    for old in (directory, *copies):
        for left in (stage, f".{stage}.partial", OFFER):
            shutil.rmtree(old / left, ignore_errors=True)
    attempt = directory / COPY.format(len(copies) + 1)
    attempt.mkdir()
    return attempt


def find_attempt(directory: Path) -> Path:
    """The run directory in which a trial trained last."""
    return max(directory.glob("copy-*"), default=directory)


def offer_checkpoint(attempt: Path, stage: str, step: int) -> Path | None:
    """A trial's checkpoint of `step`, or a later one, linked to where nothing removes it; None when
    there is none and will be none."""
    store, offer = attempt / f".{stage}.partial" / CHECKPOINTS, attempt / OFFER
    deadline = time.monotonic() + SAVED_S
    while store.is_dir() and time.monotonic() < deadline:
        shutil.rmtree(offer, ignore_errors=True)
        found = list_checkpoints(store)
        if found and found[-1].name >= name_step(step):
            try:
                return Path(shutil.copytree(found[-1], offer, copy_function=_link))
            except OSError:  # removed in between, for a newer one
                continue
        events = read_lines(store.parent / EVENTS_FILE)
        if any(row["what"] == "checkpoint_failed" and row["step"] >= step for row in events):
            return None
        time.sleep(POLL_S / 10)
    return None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def trial_recipe(
    recipe: Recipe,
    config: TuneConfig,
    values: Mapping[str, Any],
    directory: Path,
    donor: Path | None,
) -> Recipe:
    """The recipe of one trial: values, resources, its own run directory, and the checkpoint of
    another trial to begin with, if any."""
    own: dict[str, Any] = {f"{config.stage}.{key}": value for key, value in values.items()}
    ranks = "learner" if config.stage == "align" else "workers"
    own |= {
        "run": directory,
        f"{config.stage}.{ranks}.cpus": config.cpus,
        f"{config.stage}.{ranks}.gpus": config.gpus,
    }
    if donor is not None:
        own[f"{config.stage}.checkpoints.adopt"] = donor
    return change(recipe, own, "a trial's value")


def read_metrics(directory: Path, stage: str) -> list[dict[str, Any]]:
    """A trial's rows so far, of its stage finished or in the making; `step` counts steps done."""
    rows = read_lines(find_file(directory, stage, METRICS_FILE))
    if stage == "align":  # whose rows have the number of their step, which begins at 0
        rows = [row | {"step": row["step"] + 1} for row in rows]
    return rows


def read_samples(directory: Path, stage: str) -> list[dict[str, Any]]:
    """Rows of `step`, `prompt` and `text` of a finished stage."""
    if stage == "align":
        return tune_alignment.read_samples(directory / EXAMPLES_FILE)
    return read_lines(directory / SAMPLES_FILE)


def find_file(directory: Path, stage: str, name: str) -> Path:
    """File `name` of a trial's stage, finished or in the making."""
    directory = find_attempt(directory)
    finished = directory / stage / name
    return finished if finished.is_file() else directory / f".{stage}.partial" / name


def collect(trial: Trial, directory: Path, stage: str) -> TrialRow:
    """A trial with what its stage says of itself."""
    found = Run(find_attempt(directory)).find(stage)
    summary = {} if found is None else found.manifest.summary
    metrics = read_metrics(directory, stage)
    samples = [] if found is None else read_samples(found.path, stage)
    events = read_lines(find_file(directory, stage, EVENTS_FILE))
    last = max((row["step"] for row in samples), default=0)
    if found is not None:  # Ray Tune's time is 0 for one that was finished before it knew
        trial = replace(trial, seconds=max(trial.seconds, found.manifest.seconds))
    return TrialRow(
        trial=trial,
        parameters=summary.get("parameters"),
        trainable=next(
            (row["trainable"] for row in events if "trainable" in row),
            summary.get("trained_parameters"),
        ),
        curve=tuple((row["step"], row) for row in metrics),
        samples=tuple((row["prompt"], row["text"]) for row in samples if row["step"] == last),
    )


def keep(recipe: Recipe, config: TuneConfig, best: Trial, storage: Path, draft: Draft) -> None:
    """The best trial's stage in `best/`, and the recipe that makes it."""
    source = find_attempt(storage / best.name) / config.stage
    shutil.rmtree(draft.path / "best", ignore_errors=True)
    shutil.copytree(source, draft.path / "best", ignore=shutil.ignore_patterns("manifest.json"))
    chosen = change(
        recipe, {f"{config.stage}.{key}": value for key, value in best.values.items()}, "tune"
    )
    body = chosen.model_dump(mode="json", exclude_unset=True, exclude={"tune", "redo"})
    text = yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
    comment = f"# The best of {config.metric}={best.metric:.4f}, found by jobs.tune.\n"
    if config.scheduler == "pbt":
        comment += "# Of its last steps: pbt changed these values on the way to best/.\n"
    (draft.path / "best.yaml").write_text(comment + text, encoding="utf-8")


def _planned_steps(recipe: Recipe, config: TuneConfig) -> int:
    stage = getattr(recipe, config.stage)
    assert isinstance(stage, AlignConfig | TrainingConfig)
    epochs = stage.epochs if isinstance(stage, TrainingConfig) else None
    if epochs is not None or any(key in ("steps", "epochs") for key in config.space):
        raise UserError(
            f"tune compares trials at equal steps: give {config.stage}.steps, one for all trials, "
            "and not epochs"
        )
    return stage.steps


def _progress(storage: Path, config: TuneConfig, steps: int) -> tuple[float, str]:
    """Trials' worth of steps done, and the best metric so far."""
    done, values = 0.0, []
    for directory in storage.glob("*/"):
        rows = read_metrics(directory, config.stage)
        if rows:
            done += min(1.0, rows[-1]["step"] / steps)
        values += [row[config.metric] for row in rows if config.metric in row]
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return done, ""
    best = min(values) if config.goal == "min" else max(values)
    return done, f"best {config.metric} {best:.4f}"


if __name__ == "__main__":
    main("tune", run)
