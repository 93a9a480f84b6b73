"""Search over the keys of a training stage with Ray Tune: many trials, few of them to the end.

A trial is one run of the stage's own job in a directory of its own; this module knows only that it
reports rows of metrics. What is drawn, who is stopped early and who copies whom is Ray Tune's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator

from raylign.config import RangeConfig, TuneConfig, UserError
from raylign.training.reservation import (
    IdleReservations,
    release_afterwards,
    release_reservations,
)

STEP = "step"
FAILURE_FILE = "failure.txt"
REFUSAL_FILE = "refusal.txt"
"""Why no trial of this search can succeed, once one has found out."""
EXPERIMENT = "experiment"

Report = Callable[[Mapping[str, float], Path | None], None]
"""A row of metrics with its `step`, and the checkpoint that goes with it, if any."""
TrialFunction = Callable[[Mapping[str, Any], Path, Report, Path | None], None]
"""(values by key, the trial's directory, report, checkpoint to begin with) run to the end."""


class SearchError(UserError):
    """A mistake that every trial would make."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one choice of values."""

    name: str
    values: dict[str, Any]
    """Key below the stage's section to the value tried."""
    status: str
    """`finished`, `stopped` early, or `failed`."""
    metric: float
    """Best value reported; NaN when none was."""
    step: int
    """Last step reported."""
    seconds: float
    """Of training, its start included."""
    failure: str = ""
    """One line, when failed."""


def count_trials(config: TuneConfig) -> int:
    """Trials that there will be: the grid's size, or as many draws as asked for."""
    if config.search == "random":
        return config.trials
    return math.prod(len(values) for values in config.space.values() if isinstance(values, tuple))


def check_search(config: TuneConfig) -> None:
    """Raises `UserError` for a search that cannot be made."""
    if not config.space:
        raise UserError("tune.space is empty; give keys with the values to try, as in README")
    for key, values in config.space.items():
        if isinstance(values, RangeConfig):
            if config.search == "grid":
                raise UserError(
                    f"tune.space.{key} is a range, and a grid needs lists; give its values, or "
                    "tune.search=random"
                )
            if not values.low < values.high or (values.log and values.low <= 0):
                raise UserError(
                    f"tune.space.{key}: low={values.low:g} must be below high={values.high:g}"
                    + (" and above 0 on a logarithmic scale" if values.log else "")
                )
        elif not values:
            raise UserError(f"tune.space.{key} is an empty list; give the values to try")
    fixed = [key for key in config.space if not key.startswith("optimizer.")]
    if config.scheduler == "pbt" and fixed:
        raise UserError(
            f"tune.space.{fixed[0]} cannot change while a model trains, as pbt does; search "
            "optimizer.* keys with it, or use tune.scheduler=asha"
        )
    if config.scheduler == "pbt" and config.concurrent < count_trials(config):
        raise UserError(
            f"tune.scheduler=pbt copies between trials that run side by side, and "
            f"tune.concurrent={config.concurrent} is less than the {count_trials(config)} trials; "
            "raise it (fractions of tune.cpus or tune.gpus let them share), or try fewer"
        )


def search(
    function: TrialFunction, config: TuneConfig, steps: int, storage: Path, seed: int
) -> list[Trial]:
    """Run all trials, going on with those that an interrupted search had begun.

    steps: of a whole trial. `storage` keeps the search's state and a directory for each trial.
    Raises `SearchError` when one of them says that none can succeed.
    """
    storage.mkdir(parents=True, exist_ok=True)
    _Draws.at_once = config.concurrent
    trainable = tune.with_resources(_Trainable(function, storage, config), {"CPU": 0.01})
    path = storage / EXPERIMENT
    if tune.Tuner.can_restore(str(path)):
        tuner = tune.Tuner.restore(
            str(path),
            trainable=trainable,
            param_space=_draw_space(config),
            resume_unfinished=True,
            restart_errored=True,
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=_draw_space(config),
            tune_config=tune.TuneConfig(
                metric=config.metric,
                mode=config.goal,
                scheduler=_build_scheduler(config, steps),
                search_alg=_Draws(random_state=seed % 2**32),
                num_samples=config.trials if config.search == "random" else 1,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=EXPERIMENT,
                storage_path=str(storage),
                stop={STEP: steps},  # who has come so far is neither paused nor copied over
                callbacks=[_Release(storage)],
                verbose=0,
            ),
        )
    with release_afterwards():  # whatever trials were ended without their notice
        results = tuner.fit()
    found = [_describe(result, config, steps, storage) for result in results]
    refusal = storage / REFUSAL_FILE
    if refusal.is_file():
        raise SearchError(refusal.read_text(encoding="utf-8"))
    return sorted(found, key=lambda trial: trial.name)


def best_trial(trials: Sequence[Trial], config: TuneConfig) -> Trial:
    """The finished trial with the best metric. Raises `UserError` when none finished."""
    finished = [t for t in trials if t.status == "finished" and not math.isnan(t.metric)]
    if not finished:
        reasons = {t.failure for t in trials if t.failure} or {"no trial reported a result"}
        raise UserError(
            f"tune: none of {len(trials)} trials finished with a {config.metric}: "
            f"{sorted(reasons)[0]}"
        )
    sign = 1.0 if config.goal == "min" else -1.0
    return min(finished, key=lambda trial: (sign * trial.metric, trial.name))


class _Draws(BasicVariantGenerator):
    """Ray Tune's draws. How many trials there are at once is this process's to say: a search that
    was interrupted may go on with another number than the one stored with it."""

    at_once = 1

    def next_trial(self) -> Any:
        """The next one to start, or None."""
        self.max_concurrent = self.at_once
        return super().next_trial()


class _Release(tune.Callback):
    """Gives back what the ranks of a trial hold once Ray Tune has ended it, early or not."""

    def __init__(self, storage: Path) -> None:
        self._storage = storage
        self._idle = IdleReservations()

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        self._idle.release()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        release_reservations(self._storage / trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        release_reservations(self._storage / trial.trial_id)


class _Trainable:
    """What Ray Tune calls in a process of its own for each trial."""

    __name__ = "trial"

    def __init__(self, function: TrialFunction, storage: Path, config: TuneConfig) -> None:
        self._function, self._storage = function, storage

    def __call__(self, values: dict[str, Any]) -> None:
        directory = self._storage / tune.get_context().get_trial_id()
        directory.mkdir(exist_ok=True)
        release_reservations(directory)  # of the attempt before, which was paused or killed
        donor = tune.get_checkpoint()
        refusal = self._storage / REFUSAL_FILE

        def report(row: Mapping[str, float], checkpoint: Path | None) -> None:
            # Ray copies a checkpoint before this returns.
            found = None if checkpoint is None else tune.Checkpoint(str(checkpoint))
            tune.report(dict(row), checkpoint=found)

        try:
            if refusal.is_file():
                raise SearchError(refusal.read_text(encoding="utf-8"))
            self._function(values, directory, report, None if donor is None else Path(donor.path))
        except UserError as error:
            if isinstance(error, SearchError):
                refusal.write_text(str(error), encoding="utf-8")
            (directory / FAILURE_FILE).write_text(str(error), encoding="utf-8")
            raise


def _draw_space(config: TuneConfig) -> dict[str, Any]:
    """Ray Tune's form of the search space."""
    space: dict[str, Any] = {}
    for key, values in config.space.items():
        if isinstance(values, RangeConfig):
            space[key] = _draw_range(values)
        elif config.search == "grid":
            space[key] = tune.grid_search(list(values))
        else:
            space[key] = tune.choice(list(values))
    return space


def _draw_range(values: RangeConfig) -> Any:
    if values.integer:
        low, high = math.ceil(values.low), math.floor(values.high) + 1  # Ray leaves the end out
        return tune.lograndint(low, high) if values.log else tune.randint(low, high)
    draw = tune.loguniform if values.log else tune.uniform
    return draw(values.low, values.high)


def _build_scheduler(config: TuneConfig, steps: int) -> TrialScheduler:
    if config.scheduler == "asha":
        return ASHAScheduler(
            time_attr=STEP,
            max_t=steps,
            grace_period=min(config.grace_steps, steps),
            reduction_factor=config.reduction,
        )
    if config.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr=STEP,
            perturbation_interval=config.grace_steps,
            hyperparam_mutations={
                key: _draw_range(values) if isinstance(values, RangeConfig) else list(values)
                for key, values in config.space.items()
            },
        )
    return FIFOScheduler()


def _describe(result: Any, config: TuneConfig, steps: int, storage: Path) -> Trial:
    metrics = result.metrics or {}
    name = Path(result.path).name
    failure = storage / name / FAILURE_FILE
    values = [math.nan]
    if result.metrics_dataframe is not None and config.metric in result.metrics_dataframe:
        values = [v for v in result.metrics_dataframe[config.metric] if not math.isnan(v)] or values
    step = int(metrics.get(STEP, 0))
    status = "failed" if result.error else "finished" if step >= steps else "stopped"
    text = failure.read_text(encoding="utf-8") if failure.is_file() else str(result.error or "")
    return Trial(
        name=name,
        values=dict(result.config or {}),
        status=status,
        metric=min(values) if config.goal == "min" else max(values),
        step=step,
        seconds=float(metrics.get("time_total_s", 0.0)),
        failure=text.strip().splitlines()[-1] if status == "failed" and text.strip() else "",
    )
