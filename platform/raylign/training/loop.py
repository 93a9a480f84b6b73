"""Supervised training on one rank: steps, measurements, samples, checkpoints, export.

Everything that a step computes is a function of the task and the step number, so a run that was
interrupted and resumed from a checkpoint ends with the same weights as one that was not.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylign.config import (
    CheckpointConfig,
    EngineConfig,
    OptimizerConfig,
    ScheduleConfig,
    UserError,
)
from raylign.data.packing import rows_for_step
from raylign.models.assembly import ModelPlan
from raylign.models.folding import rebuild
from raylign.models.loading import load_tokenizer
from raylign.models.quantization import count_weights
from raylign.run import hash_json
from raylign.runtime import derive_seed
from raylign.tracking import METRICS_FILE, JsonTracker, read_lines
from raylign.training.continuation import Continuation, describe_value, outline
from raylign.training.divergence import keep_rows
from raylign.training.engine import DivergenceError, Engine, build_engine
from raylign.training.export import export_stage
from raylign.training.heartbeat import Pulse
from raylign.training.objectives import Objective
from raylign.training.peers import Peers
from raylign.training.room import explain_full
from raylign.training.rows import Rows, Whole, deal
from raylign.training.sampling import SAMPLES_FILE, Sampler
from raylign.training.schedule import learning_rate
from raylign.training.sums import LossFunction, Sums, add
from raylign.training.validation import Validation, average

LOG_EVERY = 10
CHECKPOINTS = ".checkpoints"
SCRATCH = ".scratch"
DIVERGED = "diverged"


@dataclass(frozen=True, slots=True)
class SupervisedTask:
    """All that a rank needs to know; small, and the same on every rank."""

    name: str
    """The stage, as in messages to the user."""
    output: Path
    """Directory of the stage in the making, seen by every rank."""
    model: ModelPlan
    tokenizer: Path
    objective: Objective
    seed: int
    """Of the order of rows, and of what is random inside a step."""
    steps: int
    batch_size: int
    """Rows a step, over all ranks."""
    micro_batch_size: int
    """Rows a rank computes at once."""
    checkpoint_every: int
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    engine: EngineConfig
    threads: int
    prompts: tuple[tuple[str, tuple[int, ...]], ...]
    """Shown text and token ids to continue at every checkpoint."""
    sample_tokens: int
    sample_temperature: float = 0.0
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)


class SupervisedLoop:
    """One rank of a supervised run. `torch.distributed` is initialised when there are several."""

    def __init__(self, task: SupervisedTask, pulse: Pulse | None = None) -> None:
        """`pulse` is told what is being done, for those who watch from outside."""
        self._task, self._objective, self._pulse = task, task.objective, pulse
        self._train: Rows[Any] = task.objective.open("train")
        self._tokenizer = load_tokenizer(task.tokenizer)
        model = task.model.build()
        self._parameters = sum(count_weights(p) for p in model.parameters())
        form = outline(model, self._tokenizer, _identify(task), task.engine.dtype)
        self._trainable = form.trained
        self._engine: Engine = build_engine(task.engine, model, task.optimizer)
        self._peers = Peers(self._engine.rank, self._engine.world_size, self._engine.device)
        self._validation = Validation(
            self._engine,
            task.objective,
            task.micro_batch_size,
            task.engine.pipeline_parallel,
            self._touch,
        )
        self._checkpoints = Continuation(
            task.name,
            task.output / CHECKPOINTS,
            self._engine,
            self._tokenizer,
            task.checkpoints,
            form,
            dtype=task.engine.dtype,
            saves=(task.steps - 1) // task.checkpoint_every,
            timeout_s=task.engine.timeout_s,
            beat=self._touch,
        )
        self._tokens, self._seconds = 0, 0.0
        self._window = _Window()

    def run(self) -> dict[str, Any]:
        """Train to the last step, going on from the newest checkpoint, and export the model.

        Returns tokens and seconds of training, and the number of parameters. Raises `UserError`
        when loss or gradient are no longer numbers.
        """
        task = self._task
        self._checkpoints.find()  # what is refused is refused before anything takes long
        self._objective.begin(self._engine, task.output / SCRATCH, self._touch)
        first = self._resume()
        tracker = JsonTracker(task.output) if self._engine.rank == 0 else None
        if tracker is not None:
            tracker.event(
                what="started",
                step=first,
                ranks=self._engine.world_size,
                trainable=self._trainable,
            )
        if first == 0 and isinstance(task.model.start, Path):
            self._sample(0)  # what it wrote before
        for step in range(first, task.steps):
            rate = self._rate(step)
            norm = self._take_step(step, rate)
            done = step + 1
            check = done % task.checkpoint_every == 0 or done == task.steps
            if check or done == 1 or done % LOG_EVERY == 0:
                self._mark(done, "measuring")
                values = self._measure() | {"lr": rate, "grad_norm": norm}
                if check and self._validation.count:
                    found = self._validation.measure()
                    values |= {f"validation_{name}": value for name, value in found.items()}
                if tracker is not None:
                    tracker.log(done, values)
            if check:
                self._mark(done, "sampling")
                self._sample(done)
                if done < task.steps:
                    self._mark(done, "saving")
                    progress = {"tokens": self._tokens, "seconds": self._seconds}
                    self._checkpoints.save(done, progress)
            self._record(tracker)
        self._mark(task.steps, "ending")
        self._checkpoints.finish()
        self._record(tracker)
        if tracker is not None:
            tracker.close()
        return self._export()

    def explain_full(self) -> str:
        """What to tell the user when the disk is full."""
        root = self._task.output / CHECKPOINTS
        return explain_full(self._task.name, root, self._checkpoints.demand)

    def _record(self, tracker: JsonTracker | None) -> None:
        """What became of checkpoints."""
        for event in self._checkpoints.take_events():
            if tracker is not None:
                tracker.event(**event)

    def _mark(self, step: int, phase: str) -> None:
        if self._pulse is not None:
            self._pulse.mark(step, phase)

    def _touch(self) -> None:
        if self._pulse is not None:
            self._pulse.touch()

    def _take_step(self, step: int, rate: float) -> float:
        """One update on this rank's share of the step's rows; the gradient norm."""
        started = time.perf_counter()
        task, engine, objective = self._task, self._engine, self._objective
        # Dropout and noise: nothing random is carried from one step to the next.
        torch.manual_seed(derive_seed(task.seed, "step", str(step), str(engine.data_rank)))
        self._mark(step + 1, "reading")
        rows = rows_for_step(self._train.count, task.seed, step, task.batch_size)
        # Every rank reads what the denominators of the whole batch need: nothing to communicate.
        whole: Whole = self._train.read(rows)
        totals = objective.count(whole)
        parts = deal(len(rows), engine.data_rank, engine.data_ranks, task.micro_batch_size)
        batches = [objective.assemble(whole, part, step) for part in parts]
        self._mark(step + 1, "forward")
        if objective.surveyed:
            surveyed = [objective.assemble_survey(whole, part) for part in parts]
            totals = totals | average(engine, engine.measure(surveyed, self._survey))
        sums = engine.accumulate(batches, self._watched(partial(objective.loss, totals=totals)))
        self._mark(step + 1, "reducing")
        try:
            norm = engine.step(rate)
        except DivergenceError as error:
            raise self._refuse_to_diverge(step, rows, whole, error) from None
        self._window.add(sums, whole.real_tokens, time.perf_counter() - started)
        return norm

    def _survey(self, *arguments: Any) -> Sums:
        self._touch()
        return self._objective.survey(*arguments)

    def _watched(self, function: LossFunction) -> LossFunction:
        """The same, and every micro-batch a sign of progress."""

        def call(*arguments: Any) -> tuple[torch.Tensor, Sums]:
            self._touch()
            return function(*arguments)

        return call

    def _measure(self) -> dict[str, float]:
        """Means since the last call, and the speed; collective."""
        window, self._window = self._window, _Window()
        self._tokens += window.real
        self._seconds += window.seconds
        return average(self._engine, window.sums) | {
            "tokens_per_second": window.real / window.seconds
        }

    def _refuse_to_diverge(
        self, step: int, rows: np.ndarray, whole: Any, error: DivergenceError
    ) -> UserError:
        """The batch, saved for inspection beside the stage; what to tell the user."""
        task = self._task
        kept = task.output.parent / DIVERGED / f"{task.name}-step-{step + 1:08d}"
        if self._engine.rank == 0:
            keep_rows(kept, rows, whole, self._train, self._tokenizer)
        return UserError(
            f"{task.name}: {error} at step {step + 1}, and no rank has taken it; lower "
            f"{task.name}.optimizer.lr or raise {task.name}.schedule.warmup_steps; the step's rows "
            f"are in {kept}"
        )

    def _sample(self, done: int) -> None:
        """Continue the prompts on the first rank, however long that takes; collective."""
        task, engine = self._task, self._engine
        if not task.prompts:
            return
        parts = None if engine.whole else (engine.weights(), engine.exportable())

        def write() -> None:
            lm = engine.lm
            if parts is not None:
                lm = rebuild(lm, *parts, engine.device)
            sampler = Sampler(lm, self._tokenizer)
            with (task.output / SAMPLES_FILE).open("a", encoding="utf-8") as stream:
                for shown, ids in task.prompts:
                    seed = derive_seed(task.seed, "sample", str(done), shown)
                    text = sampler.complete(ids, task.sample_tokens, task.sample_temperature, seed)
                    stream.write(json.dumps({"step": done, "prompt": shown, "text": text}) + "\n")

        self._peers.ask_first(write, self._touch)
        engine.module.train()

    def _resume(self) -> int:
        """The first step to take; what was recorded after the newest checkpoint is forgotten."""
        task = self._task
        step, progress = self._checkpoints.resume()
        if step:
            self._tokens, self._seconds = progress["tokens"], progress["seconds"]
        if self._engine.rank == 0:
            for name in (METRICS_FILE, SAMPLES_FILE):
                _rewind(task.output / name, step or -1)
        return step

    def _export(self) -> dict[str, Any]:
        return {
            "adaptation": export_stage(self._engine, self._tokenizer, self._task.output),
            "tokens": self._tokens,
            "seconds": self._seconds,
            "parameters": self._parameters,
        }

    def _rate(self, step: int) -> float:
        task = self._task
        return learning_rate(step, task.steps, task.optimizer.lr, **task.schedule.model_dump())


class _Window:
    """What happened since the last measurement."""

    def __init__(self) -> None:
        self.sums: Sums = {}
        """This rank's; read only when measured."""
        self.real, self.seconds = 0, 0.0

    def add(self, sums: Sums, real: int, seconds: float) -> None:
        """A step's sums, its real (not padding) tokens over all ranks, and its time."""
        add(self.sums, sums)
        self.real += real
        self.seconds += seconds


def _identify(task: SupervisedTask) -> dict[str, Any]:
    """What the result of a step is a function of, besides model and tokenizer; neither engine nor
    number of ranks."""
    values = (task.objective, task.optimizer, task.schedule, task.model.peft, task.model.adapter)
    text = json.dumps([describe_value(value) for value in values])
    numbers = {"seed": task.seed, "batch_size": task.batch_size, "steps": task.steps}
    return numbers | {"task": hash_json([task.name, text])}


def _rewind(file: Path, step: int) -> None:
    """Keep the rows of a JSON-lines file that were written up to `step`."""
    rows = [row for row in read_lines(file) if row["step"] <= step]
    if file.exists():
        draft = file.with_name(f".{file.name}")
        draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(draft, file)
