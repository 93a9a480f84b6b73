"""Where metrics go besides the stage's own files; none of it can fail a run, or hold it up.

A sink is opened, fed and closed on a thread of its own. Whatever raises there, or takes too long,
turns that sink off with one warning, and the run goes on.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from raylign.config import UserError
from raylign.config.alignment import SinksConfig
from raylign.outbox import Outbox

TIMEOUT_S = 60.0
CAPACITY = 1000
IDENTITY = ".sinks"
HIDDEN = "***"

# Module, and what to install. Lower bounds: without one, pip goes back to releases that are years
# old where a newer one does not fit.
_PACKAGES = {
    "tensorboard": ("tensorboardX", "tensorboardX>=2.6"),
    "wandb": ("wandb", "wandb>=0.31"),
    "mlflow": ("mlflow", "mlflow>=3"),
    "trackio": ("trackio", "trackio>=0.43"),
}
_SECRET_WORDS = {"secret", "secrets", "password", "passwd", "credential", "credentials", "apikey"}
_SECRET_ENDS = ("authorization", "api_key", "access_key", "private_key", "_token")
_SECRET_TEXT = re.compile(r"\b(sk|hf|ghp|xox[bp])[-_][\w-]{16,}|(?<=://)[^/@\s]+(?=@)")
# MLflow's limits on one request, and on one value.
_MLFLOW_PARAMS, _MLFLOW_VALUE = 100, 500


class Sink(Protocol):
    """A place for the metrics of steps; everything may raise, and take its time."""

    name: str

    def open(self) -> None:
        """Called once, before all else."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def rewind(self, step: int) -> None:
        """`step` and those after it will come again."""
        ...

    def close(self) -> None: ...


class GuardedSink:
    """A sink that cannot fail: after the first trouble it warns once and takes nothing more."""

    def __init__(
        self,
        sink: Sink,
        warn: Callable[[str, str], None],
        timeout_s: float = TIMEOUT_S,
        capacity: int = CAPACITY,
    ) -> None:
        """`warn(name, reason)` may be called on any thread; timeout_s: of one call to the sink."""
        self.name, self._sink, self._warn, self._timeout_s = sink.name, sink, warn, timeout_s
        self._lock = threading.Lock()
        self.on = True
        self._outbox = Outbox(f"sink-{sink.name}", capacity, self._fail)
        self._outbox.put(sink.open, needed=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step, some time soon."""
        values = dict(metrics)
        self._put(lambda: self._sink.log(step, values))

    def rewind(self, step: int) -> None:
        """`step` and those after it will come again."""
        self._put(lambda: self._sink.rewind(step))

    def close(self) -> None:
        """Hand over what is left; waits no longer than one call may take."""
        self._put(self._sink.close)
        if not self._outbox.close(self._timeout_s if self.on else 0.0):
            self._turn_off(f"did not finish within {self._timeout_s:.0f} s")

    def _put(self, work: Callable[[], None]) -> None:
        if self.on and self._outbox.stuck_seconds > self._timeout_s:
            self._turn_off(f"has not answered for {self._timeout_s:.0f} s")
        if self.on and not self._outbox.put(lambda: work() if self.on else None):
            self._turn_off("is too far behind")

    def _fail(self, error: Exception) -> None:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        self._turn_off(f"{type(error).__name__}: {first}"[:300])

    def _turn_off(self, reason: str) -> None:
        with self._lock:
            if not self.on:
                return
            self.on = False
        self._outbox.clear()
        self._warn(self.name, reason)


class TensorBoardSink:
    """Event files that TensorBoard reads."""

    name = "tensorboard"

    def __init__(self, directory: Path) -> None:
        self._directory, self._writer = directory, None

    def open(self) -> None:
        """Opened with the first step, which may be one that comes again."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        writer = self._writer or self._start(step)
        for name, value in metrics.items():
            writer.add_scalar(re.sub(r"[^\w/.-]+", "_", name), value, step)
        writer.flush()

    def rewind(self, step: int) -> None:
        self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _start(self, step: int) -> Any:
        # A file opened in the same second has the same name but for its suffix. What an earlier one
        # holds of this step and later is hidden by purge_step.
        self._writer = importlib.import_module("tensorboardX").SummaryWriter(
            str(self._directory),
            purge_step=step if self._directory.is_dir() else None,
            filename_suffix=f".{uuid.uuid4().hex[:8]}",
        )
        return self._writer


class WandbSink:
    """A run of Weights & Biases. What is logged for a step again stands beside the first: its axis
    is the metric `step`, since its own counter takes no step twice."""

    name = "wandb"

    def __init__(self, project: str, run: str, identity: str, settings: Mapping[str, Any]) -> None:
        self._project, self._name, self._identity, self._settings = project, run, identity, settings
        self._run: Any = None

    def open(self) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=self._project,
            name=self._name,
            id=self._identity,
            resume="allow",
            config=dict(self._settings),
            # The terminal is the board's, and nobody is there to be asked for a key.
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=TIMEOUT_S / 2, login_timeout=1
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def rewind(self, step: int) -> None:
        """The step is a metric: it may come again."""

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """A run of MLflow, at the server that MLFLOW_TRACKING_URI names."""

    name = "mlflow"

    def __init__(
        self, experiment: str, run: str, identity: str, settings: Mapping[str, Any]
    ) -> None:
        self._experiment, self._name, self._identity = experiment, run, identity
        self._settings = settings
        self._client: Any = None
        self._run = ""

    def open(self) -> None:
        entity = importlib.import_module("mlflow.entities").Param
        self._client = client = importlib.import_module("mlflow").MlflowClient()
        found = client.get_experiment_by_name(self._experiment)
        place = found.experiment_id if found else client.create_experiment(self._experiment)
        tag = f"tags.raylign = '{self._identity}'"
        begun = client.search_runs([place], tag, max_results=1)
        if begun:
            self._run = begun[0].info.run_id
            return
        created = client.create_run(place, tags={"raylign": self._identity}, run_name=self._name)
        self._run = created.info.run_id
        flat = [entity(k, str(v)[:_MLFLOW_VALUE]) for k, v in flatten(self._settings)]
        for start in range(0, len(flat), _MLFLOW_PARAMS):
            client.log_batch(self._run, params=flat[start : start + _MLFLOW_PARAMS])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        entity = importlib.import_module("mlflow.entities").Metric
        now = int(time.time() * 1000)
        rows = [
            entity(re.sub(r"[^\w/ .-]", "_", k), float(v), now, step) for k, v in metrics.items()
        ]
        self._client.log_batch(self._run, metrics=rows)

    def rewind(self, step: int) -> None:
        """A step may come again; the later time is the newer value."""

    def close(self) -> None:
        self._client.set_terminated(self._run)


class TrackioSink:
    """A run of Trackio; on this machine, or where TRACKIO_SPACE_ID says."""

    name = "trackio"

    def __init__(self, project: str, run: str, settings: Mapping[str, Any]) -> None:
        self._project, self._name, self._settings = project, run, settings
        self._run: Any = None

    def open(self) -> None:
        trackio = importlib.import_module("trackio")
        self._run = trackio.init(
            project=self._project, name=self._name, config=dict(self._settings), resume="allow"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def rewind(self, step: int) -> None:
        """A step may come again."""

    def close(self) -> None:
        self._run.finish()


def check_sinks(config: SinksConfig) -> None:
    """Raises `UserError` for a sink whose package is not installed."""
    for key, (module, package) in _PACKAGES.items():
        chosen = getattr(config, key)
        if chosen and importlib.util.find_spec(module) is None:
            off = "false" if key == "tensorboard" else "null"
            raise UserError(
                f"align.sinks.{key}={chosen}, and {module} is not installed; run "
                f"`pip install '{package}'`, or set align.sinks.{key}={off}"
            )


def build_sinks(config: SinksConfig, directory: Path, settings: Mapping[str, Any]) -> list[Sink]:
    """The sinks that `config` asks for, not yet opened; see `GuardedSink`.

    directory: of the stage, whose run gives the name; an attempt that goes on after another is the
    same run to every sink. `settings` are shown there, without secrets. Raises `UserError` as
    `check_sinks` does.
    """
    check_sinks(config)
    shown, sinks = redact(settings), list[Sink]()
    if config.tensorboard:
        sinks.append(TensorBoardSink(directory / "tensorboard"))
    if not (config.wandb or config.mlflow or config.trackio):
        return sinks
    identity, run = _identify(directory), directory.absolute().parent.name
    if config.wandb:
        sinks.append(WandbSink(config.wandb, run, identity, shown))
    if config.mlflow:
        sinks.append(MlflowSink(config.mlflow, run, identity, shown))
    if config.trackio:
        sinks.append(TrackioSink(config.trackio, f"{run}-{identity[:6]}", shown))
    return sinks


def _identify(directory: Path) -> str:
    """A name no other run has, kept in the stage for as long as it is in the making."""
    file = directory / IDENTITY
    if file.is_file() and (found := file.read_text(encoding="utf-8").strip()):
        return found
    directory.mkdir(parents=True, exist_ok=True)
    identity = uuid.uuid4().hex
    file.write_text(identity, encoding="utf-8")
    return identity


def redact(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON, with what looks like a secret, by its key or by its text, as `***`."""
    hidden: dict[str, Any] = _hide(json.loads(json.dumps(dict(settings), default=str)))
    return hidden


def _hide(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _hide(inner, str(name).lower()) for name, inner in value.items()}
    if isinstance(value, list):
        return [_hide(inner, key) for inner in value]
    secret = _SECRET_WORDS & set(re.split(r"[\W_]+", key)) or key.endswith(_SECRET_ENDS)
    if value is not None and (secret or key == "token"):
        return HIDDEN
    return _SECRET_TEXT.sub(HIDDEN, value) if isinstance(value, str) else value


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`a.b`, value) of nested settings."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
