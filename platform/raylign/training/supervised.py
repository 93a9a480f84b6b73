"""The one Ray Train loop, of pre-training and of fine-tuning alike.

Ray Train starts the ranks, and starts them again when one dies; what survives is in the output
directory, which every rank must see. The driver follows the run by reading its metrics file, so the
ranks wait for nobody.
"""

from __future__ import annotations

import json
import pickle
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors import SafetensorError

from raylign.config import UserError, WorkersConfig
from raylign.run import write_json
from raylign.runtime import disconnect, is_private
from raylign.tracking import EVENTS_FILE, METRICS_FILE, Bar, GrowingLines, JsonTracker, read_lines
from raylign.training.admission import require_trainable
from raylign.training.checkpoints import retain
from raylign.training.curve import CURVE_FILE, draw_curve
from raylign.training.export import ADAPTER, MODEL
from raylign.training.heartbeat import Laggard, Mark, Pulse, Watch, end_process, locate
from raylign.training.loop import CHECKPOINTS, SupervisedLoop, SupervisedTask
from raylign.training.rank import start_rank
from raylign.training.reservation import IdleReservations, note_reservation
from raylign.training.room import explain_full, is_out_of_room

POLL_S = 0.5
CURVE_S = 5.0  # shortest time between two pictures
KILL_S = 30.0
KEPT = "checkpoints"

# What a rank says when it is another one that failed.
_ECHOES = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out")

_REFUSAL = ".refusal.json"
_RAY_FILES = ".ray"
_HEARTBEATS = ".heartbeats"


def train(task: SupervisedTask, workers: WorkersConfig, bar: Bar) -> dict[str, Any]:
    """Run `task` on Ray workers and leave `model/` and `metrics.jsonl` in its output directory.

    Goes on from the newest checkpoint there. Returns the summary of the run.
    Raises `UserError` for what the user can put right, a group that keeps dying included.
    """
    require_trainable(task.model, task.engine, workers.count, task.name)
    _require_room(task.name, workers)
    (task.output / _REFUSAL).unlink(missing_ok=True)
    for leftover in (_RAY_FILES, _HEARTBEATS):
        shutil.rmtree(task.output / leftover, ignore_errors=True)
    outcome = _Outcome()
    thread = threading.Thread(target=_fit, args=(task, workers, outcome), daemon=True)
    # A thread of its own: Ray Train would take over Ctrl-C in the main one.
    thread.start()
    watch = Watch(task.output / _HEARTBEATS, task.engine.timeout_s)
    metrics, events = (GrowingLines(task.output / name) for name in (METRICS_FILE, EVENTS_FILE))
    picture, idle = _Picture(task, metrics), IdleReservations()
    try:
        while thread.is_alive():
            thread.join(POLL_S)
            _end_hung(task, watch.look())
            idle.release()  # groups that lost their controller would keep this one waiting
            rows = metrics.read()
            if idle.waiting:
                bar.update(rows[-1]["step"] if rows else 0, _tell_waiting(workers))
            else:
                _show(bar, rows, events.read())
            picture.draw()
    except KeyboardInterrupt:
        disconnect()  # else ranks would go on writing where the draft is being removed
        raise
    shutil.rmtree(task.output / _RAY_FILES, ignore_errors=True)
    _raise_failure(task, workers, outcome.error)
    assert outcome.result is not None
    picture.draw(last=True)
    retain(task.output / CHECKPOINTS, task.output / KEPT, task.checkpoints.after)
    return _summarise(task, outcome.result)


def train_rank(task: SupervisedTask) -> dict[str, Any] | None:
    """What every rank runs. A mistake of the user is written down, and not tried again."""
    refusal = task.output / _REFUSAL
    if refusal.exists():
        return None
    torch.set_num_threads(task.threads)
    rank = ray.train.get_context().get_world_rank()
    node = ray.get_runtime_context().get_node_id()
    note_reservation(task.output / _RAY_FILES)
    pulse = Pulse(task.output / _HEARTBEATS, rank, node)
    loop: SupervisedLoop | None = None
    try:
        loop = SupervisedLoop(task, pulse)
        return loop.run()
    except UserError as error:
        _refuse(task, str(error))
        return None
    except (OSError, SafetensorError) as error:
        if is_out_of_room(error):
            for half in (MODEL, ADAPTER):
                shutil.rmtree(task.output / half, ignore_errors=True)
            root = task.output / CHECKPOINTS
            _refuse(task, loop.explain_full() if loop else explain_full(task.name, root))
        raise  # so that the others end, too
    finally:
        pulse.stop()


def _refuse(task: SupervisedTask, text: str) -> None:
    """Tell the user, and ranks that are started again: they would do no better."""
    try:
        write_json(task.output / _REFUSAL, text)
    except OSError:
        (task.output / _REFUSAL).touch()  # an empty file may find room where nothing else does


class _Outcome:
    """What the fitting thread leaves behind."""

    result: dict[str, Any] | None = None
    error: BaseException | None = None


class _Trainer(TorchTrainer):
    """Starts no process that has nothing to do here: each would cost what a rank's imports cost.

    Rows come from memory-mapped shards, so nobody hands out Ray Data's; and a private cluster ends
    with this process, so nobody has to tidy up after it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        idle = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if is_private() else set())
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ not in idle]


def _fit(task: SupervisedTask, workers: WorkersConfig, outcome: _Outcome) -> None:
    per_worker = {"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {})
    trainer = _Trainer(
        start_rank,
        train_loop_config={"task": pickle.dumps(task)},
        torch_config=TorchConfig(timeout_s=task.engine.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=bool(workers.gpus),
            resources_per_worker=per_worker,
        ),
        run_config=RunConfig(
            name=task.name,
            storage_path=str(task.output / _RAY_FILES),
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
    )
    try:
        outcome.result = trainer.fit().return_value
    except BaseException as error:  # the edge of a thread: the main one raises it
        outcome.error = error


def _end_hung(task: SupervisedTask, laggard: Laggard | None) -> None:
    """Kill the rank that the others wait for, so that Ray Train starts the group again."""
    if laggard is None:
        return
    if _end_where_it_runs(laggard.mark):
        tracker = JsonTracker(task.output)
        tracker.event(what="hung", rank=laggard.mark.rank, text=laggard.describe())
        tracker.close()
    # Of a rank that died: Ray Train knows, and nobody must wait for it.
    locate(task.output / _HEARTBEATS, laggard.mark.rank).unlink(missing_ok=True)


def _end_where_it_runs(mark: Mark) -> bool:
    if mark.node == ray.get_runtime_context().get_node_id():
        return end_process(mark)
    there = NodeAffinitySchedulingStrategy(mark.node, soft=False)
    ended = ray.remote(num_cpus=0)(end_process).options(scheduling_strategy=there).remote(mark)
    try:
        return bool(ray.get(ended, timeout=KILL_S))
    except (RayError, GetTimeoutError):
        return False  # its machine is gone, or as stuck as the rank: Ray finds that out


class _Picture:
    """The loss curve, drawn again when there is more of it."""

    def __init__(self, task: SupervisedTask, metrics: GrowingLines) -> None:
        self._task, self._metrics = task, metrics
        self._points, self._drawn = 0, 0.0

    def draw(self, last: bool = False) -> None:
        """At every checkpoint, unless they follow each other too quickly."""
        if not last and time.monotonic() - self._drawn < CURVE_S:
            return
        rows = self._metrics.read()
        points = sum(row["step"] % self._task.checkpoint_every == 0 for row in rows)
        if not last and points <= self._points:
            return
        try:
            draw_curve(rows, self._task.name, self._task.output / CURVE_FILE)
        except OSError as error:
            if last or not is_out_of_room(error):
                raise  # while ranks run, it is they who say that the disk is full
        self._points, self._drawn = points, time.monotonic()


def _require_room(name: str, workers: WorkersConfig) -> None:
    """Ray would wait without end for what the cluster does not have."""
    present = ray.cluster_resources()
    for kind, each in (("CPU", workers.cpus), ("GPU", workers.gpus)):
        if each * workers.count > present.get(kind, 0.0):
            raise UserError(
                f"{name}.workers: {workers.count} ranks of {each:g} {kind} do not fit the "
                f"{present.get(kind, 0.0):g} {kind} of the cluster; lower "
                f"{name}.workers.count or {name}.workers.{kind.lower()}s"
            )


def _tell_waiting(workers: WorkersConfig) -> str:
    free = ray.available_resources()
    kind, each = ("GPU", workers.gpus) if workers.gpus else ("CPU", workers.cpus)
    wanted = f"{workers.count} ranks of {each:g} {kind}"
    return f"waits for room for {wanted}; {free.get(kind, 0.0):g} {kind} are free"


def _show(bar: Bar, rows: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        row = rows[-1]
        checked = [r["validation_loss"] for r in rows if "validation_loss" in r]
        note = f"loss {row['loss']:.3f}"
        note += f"  validation {checked[-1]:.3f}" if checked else ""
        restarts = _count_restarts(events)
        note += f"  {restarts} restarts" if restarts else ""
        note += _tell_failure(events)
        bar.update(row["step"], f"{note}  {row['tokens_per_second']:,.0f} tokens/s")


def _count_restarts(events: Sequence[Mapping[str, Any]]) -> int:
    return max(0, sum(row["what"] == "started" for row in events) - 1)


def _tell_failure(events: Sequence[Mapping[str, Any]]) -> str:
    """What became of the last checkpoint, when it could not be written."""
    saves = [row for row in events if row["what"] in ("checkpoint", "checkpoint_failed")]
    if not saves or saves[-1]["what"] == "checkpoint":
        return ""
    last = saves[-1]
    kept = f"; {last['kept']} is kept" if last["kept"] else ""
    return f"  checkpoint {last['step']} not written: {last['reason']}{kept}"


def _raise_failure(
    task: SupervisedTask, workers: WorkersConfig, error: BaseException | None
) -> None:
    refusal = task.output / _REFUSAL
    if refusal.exists():
        text = refusal.read_text(encoding="utf-8")
        told = json.loads(text) if text else explain_full(task.name, task.output / CHECKPOINTS)
        raise UserError(told)
    events = read_lines(task.output / EVENTS_FILE)
    hung = [row["text"] for row in events if row["what"] == "hung"]
    if isinstance(error, WorkerGroupError) and hung and events[-1]["what"] == "hung":
        raise UserError(
            f"{task.name}: {hung[-1]}; given up after {workers.max_failures} restarts of the "
            f"group; raise {task.name}.engine.timeout_s if it was only slow, else "
            f"{task.name}.workers.max_failures"
        )
    if isinstance(error, WorkerGroupError):
        raise explain_failure(task.name, workers.max_failures, error.worker_failures) from error
    if error is not None:
        raise error


def explain_failure(name: str, restarts: int, failures: Mapping[int, BaseException]) -> Exception:
    """One line about the rank that failed first, of a group whose other ranks failed with it.

    A process that died is the user's to put right; an exception of ours is a defect, and stays one.
    """

    def likelihood(rank: int) -> tuple[bool, int]:
        return any(echo in str(failures[rank]) for echo in _ECHOES), rank

    rank = min(failures, key=likelihood)
    failure = failures[rank]
    text = str(failure).strip().splitlines() or [type(failure).__name__]
    if "Actor" in f"{type(failure).__name__}{text}":
        return UserError(
            f"{name}: rank {rank} died, after {restarts} restarts of the group ({text[0]}); if "
            f"memory ran out lower {name}.micro_batch_size, else raise {name}.workers.max_failures"
        )
    return RuntimeError(f"{name}: rank {rank} failed: {type(failure).__name__}: {text[-1]}")


def _summarise(task: SupervisedTask, result: Mapping[str, Any]) -> dict[str, Any]:
    rows = read_lines(task.output / METRICS_FILE)
    checked = [row["validation_loss"] for row in rows if "validation_loss" in row]
    return {
        "initial_loss": rows[0]["loss"],
        "loss": rows[-1]["loss"],
        "validation_loss": checked[-1] if checked else None,
        "steps": task.steps,
        "restarts": _count_restarts(read_lines(task.output / EVENTS_FILE)),
        "tokens": int(result["tokens"]),
        "tokens_per_second": round(result["tokens"] / result["seconds"], 1),
        "parameters": int(result["parameters"]),
    } | result["adaptation"]
