"""Supervised training on one rank: steps, measurements, samples, checkpoints, export.

Everything that a step computes is a function of the task and the step number, so a run that was
interrupted and resumed from a checkpoint ends with the same weights as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig, PreTrainedModel

from raylign.config import EngineConfig, OptimizerConfig, ScheduleConfig, UserError
from raylign.data.packing import rows_for_step
from raylign.models.loading import initialise, load_model, load_tokenizer, save_model
from raylign.tracking import METRICS_FILE, JsonTracker, Metric, read_lines
from raylign.training.checkpoints import CheckpointStore
from raylign.training.engine import Engine, build_engine
from raylign.training.objectives import sum_cross_entropy
from raylign.training.rows import MicroBatch, Rows, assemble, deal
from raylign.training.sampling import Sampler
from raylign.training.schedule import learning_rate

LOG_EVERY = 10
SAMPLES_FILE = "samples.jsonl"
CHECKPOINTS = "checkpoints"
MODEL = "model"


@dataclass(frozen=True, slots=True)
class SupervisedTask:
    """All that a rank needs to know; small, and the same on every rank."""

    name: str
    """The stage, as in messages to the user."""
    output: Path
    """Directory of the stage in the making, seen by every rank."""
    start: Path | PreTrainedConfig
    """Directory with weights to begin with, or a configuration to initialise."""
    tokenizer: Path
    open_rows: Callable[[str], Rows]
    """Opens the split `train` or `validation`."""
    weight_seed: int
    order_seed: int
    steps: int
    batch_size: int
    """Rows a step, over all ranks."""
    micro_batch_size: int
    """Rows a rank computes at once."""
    isolate: bool
    """No attention across the documents of a row."""
    checkpoint_every: int
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    engine: EngineConfig
    threads: int
    prompts: tuple[tuple[str, tuple[int, ...]], ...]
    """Shown text and token ids to continue at every checkpoint."""
    sample_tokens: int


class SupervisedLoop:
    """One rank of a supervised run. `torch.distributed` is initialised when there are several."""

    def __init__(self, task: SupervisedTask) -> None:
        self._task = task
        self._train, self._validation = task.open_rows("train"), task.open_rows("validation")
        self._tokenizer = load_tokenizer(task.tokenizer)
        self._engine: Engine = build_engine(task.engine, _load(task), task.optimizer)
        self._store = CheckpointStore(
            task.output / CHECKPOINTS, self._engine.rank, partial(_wait, self._engine)
        )
        self._partitioned = task.engine.backend == "deepspeed" and task.engine.zero_stage == 3
        self._tokens, self._seconds = 0, 0.0
        self._window = _Window(self._engine.device)

    def run(self) -> dict[str, float]:
        """Train to the last step, going on from the newest checkpoint, and export the model.

        Returns tokens and seconds of training, and the number of parameters. Raises `UserError`
        when the loss is no longer a number.
        """
        task, first = self._task, self._resume()
        tracker = JsonTracker(task.output) if self._engine.rank == 0 else None
        if tracker is not None:
            tracker.event(what="started", step=first, ranks=self._engine.world_size)
            if self._partitioned:
                tracker.event(what="no samples: one rank alone has no whole weights under ZeRO-3")
        for step in range(first, task.steps):
            rate = self._rate(step)
            norm = self._take_step(step, rate)
            done = step + 1
            check = done % task.checkpoint_every == 0 or done == task.steps
            if check or done == 1 or done % LOG_EVERY == 0:
                values = self._measure(done) | {"lr": rate, "grad_norm": norm}
                if check and self._validation.count:
                    values["validation_loss"] = self._validate().mean
                if tracker is not None:
                    tracker.log(done, values)
            if check:
                self._sample(done)
                if done < task.steps:
                    progress = {"tokens": self._tokens, "seconds": self._seconds}
                    self._store.save(done, self._engine.save, progress)
        if tracker is not None:
            tracker.close()
        return self._export()

    def _take_step(self, step: int, rate: float) -> float:
        """One update on this rank's share of the step's rows; the gradient norm."""
        started = time.perf_counter()
        task, engine = self._task, self._engine
        rows = rows_for_step(self._train.count, task.order_seed, step, task.batch_size)
        # Every rank reads which tokens are trained in the whole batch: no need to communicate.
        tokens, segments, trained = self._train.read(rows)
        denominator = max(1, int(trained.sum()))
        for part in deal(len(rows), engine.rank, engine.world_size, task.micro_batch_size):
            batch = assemble(tokens[part], segments[part], trained[part], task.isolate)
            loss = self._sum_loss(batch)
            self._window.losses += loss.detach()
            engine.backward(loss / denominator)
        norm = engine.step(rate)
        self._window.add(denominator, int((segments > 0).sum()), time.perf_counter() - started)
        return norm

    def _sum_loss(self, batch: MicroBatch) -> torch.Tensor:
        batch = batch.to(self._engine.device)
        return sum_cross_entropy(
            self._engine.module,
            batch.tokens,
            batch.trained,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        )

    def _measure(self, done: int) -> dict[str, float]:
        """Loss per trained token and speed since the last call; collective."""
        window = self._window
        loss = Metric(self._sum_over_ranks(window.losses), window.trained).mean
        if not math.isfinite(loss):
            raise UserError(
                f"{self._task.name}: the loss is {loss} at step {done}; lower "
                f"{self._task.name}.optimizer.lr or raise {self._task.name}.schedule.warmup_steps"
            )
        self._tokens += window.real
        self._seconds += window.seconds
        values = {"loss": loss, "tokens_per_second": window.real / window.seconds}
        self._window = _Window(self._engine.device)
        return values

    @torch.no_grad()
    def _validate(self) -> Metric:
        """Loss over the whole validation split; collective."""
        task, engine, rows = self._task, self._engine, self._validation
        engine.module.eval()
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        trained_tokens = 0
        for part in deal(rows.count, engine.rank, engine.world_size, task.micro_batch_size):
            tokens, segments, trained = rows.read(range(rows.count)[part])
            total += self._sum_loss(assemble(tokens, segments, trained, task.isolate))
            trained_tokens += int(trained.sum())
        engine.module.train()
        counts = torch.tensor(trained_tokens, dtype=torch.float64, device=engine.device)
        return Metric(self._sum_over_ranks(total), self._sum_over_ranks(counts))

    def _sample(self, done: int) -> None:
        """Continue the prompts greedily, on the first rank."""
        task, engine = self._task, self._engine
        if engine.rank != 0 or not task.prompts or self._partitioned:
            return
        sampler = Sampler(engine.lm, self._tokenizer)
        with (task.output / SAMPLES_FILE).open("a", encoding="utf-8") as stream:
            for shown, ids in task.prompts:
                text = sampler.complete(ids, task.sample_tokens)
                stream.write(json.dumps({"step": done, "prompt": shown, "text": text}) + "\n")
        engine.module.train()

    def _resume(self) -> int:
        """The first step to take; what was recorded after the newest checkpoint is forgotten."""
        found = self._store.latest()
        step = 0
        if found is not None:
            directory, step, progress = found
            self._engine.load(directory)
            self._tokens, self._seconds = progress["tokens"], progress["seconds"]
        if self._engine.rank == 0:
            for name in (METRICS_FILE, SAMPLES_FILE):
                _rewind(self._task.output / name, step)
        return step

    def _export(self) -> dict[str, float]:
        task, engine = self._task, self._engine
        weights = engine.weights()
        if engine.rank == 0:
            save_model(weights, engine.lm.config, self._tokenizer, task.output / MODEL)
        parameters = sum(tensor.numel() for tensor in weights.values())
        return {"tokens": self._tokens, "seconds": self._seconds, "parameters": parameters}

    def _rate(self, step: int) -> float:
        task = self._task
        return learning_rate(step, task.steps, task.optimizer.lr, **task.schedule.model_dump())

    def _sum_over_ranks(self, value: torch.Tensor) -> float:
        if self._engine.world_size > 1:
            dist.all_reduce(value)
        return float(value)


class _Window:
    """What happened since the last measurement."""

    def __init__(self, device: torch.device) -> None:
        self.losses = torch.zeros((), dtype=torch.float64, device=device)
        """Summed over this rank's trained tokens, in nats; read only when measured."""
        self.trained, self.real, self.seconds = 0, 0, 0.0

    def add(self, trained: int, real: int, seconds: float) -> None:
        """A step's trained and real (not padding) tokens over all ranks, and its time."""
        self.trained += trained
        self.real += real
        self.seconds += seconds


def _load(task: SupervisedTask) -> PreTrainedModel:
    if isinstance(task.start, PreTrainedConfig):
        return initialise(task.start, task.weight_seed)
    return load_model(task.start)


def _wait(engine: Engine) -> None:
    if engine.world_size > 1:
        dist.barrier()


def _rewind(file: Path, step: int) -> None:
    """Keep the rows of a JSON-lines file that were written up to `step`."""
    rows = [row for row in read_lines(file) if row["step"] <= step]
    if file.exists():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
