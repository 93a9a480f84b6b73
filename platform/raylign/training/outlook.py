"""What a training stage will take, in words: from its settings, its model and its rows.

Nothing heavy is imported here: a plan is made before anything is started.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raylign.config import PretrainConfig, TrainingConfig, UserError
from raylign.models.budget import CHINCHILLA, FOLDABLE, Blueprint, count_flops
from raylign.models.memory import SIZES, Memory, estimate
from raylign.training.topology import arrange

GIB = 2**30
Lines = Iterator[tuple[str, str]]
"""(title, text) of each line."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What a step is made of."""

    sequences: int
    """Sequences in a row of the batch: 2 where answers are compared."""
    length: int
    """Tokens of a sequence, at most."""
    available: int | None = None
    """Rows there are, where they have been made already."""
    tokens: int | None = None
    """Tokens in them that are not padding."""


def check_arithmetic(
    config: TrainingConfig, blueprint: Blueprint, rows: RowPlan, stage: str
) -> None:
    """Raises `UserError` for what cannot be, however long one waits."""
    engine, ranks = config.engine, config.workers.count
    group = engine.tensor_parallel * engine.pipeline_parallel * engine.sequence_parallel
    if ranks % group:
        raise UserError(
            f"{stage}.workers.count={ranks} is no multiple of {group} = "
            f"{engine.tensor_parallel} tensor x {engine.pipeline_parallel} pipeline x "
            f"{engine.sequence_parallel} sequence parallel; give as many ranks, or several times "
            "as many"
        )
    if rows.length > blueprint.context:
        raise UserError(
            f"{stage}: rows of {rows.length:,} tokens exceed the model's context of "
            f"{blueprint.context:,}; shorten them, or choose another model"
        )
    for name, of, total in (
        ("tensor_parallel", "heads", blueprint.heads),
        ("tensor_parallel", "key/value heads", blueprint.kv_heads),
        ("tensor_parallel", "inner width", blueprint.inner),
        ("sequence_parallel", "heads of a rank", blueprint.heads // engine.tensor_parallel),
    ):
        if total % getattr(engine, name):
            raise UserError(
                f"{stage}.engine.{name}={getattr(engine, name)} does not divide the model's "
                f"{of}, {total:,}; choose a divisor"
            )
    if engine.pipeline_parallel > blueprint.layers:
        raise UserError(
            f"{stage}.engine.pipeline_parallel={engine.pipeline_parallel} exceeds the model's "
            f"{blueprint.layers} layers; lower it"
        )
    arrange(engine, ranks, f"{stage}.engine")


@dataclass(frozen=True, slots=True)
class Outlook:
    """One stage, before it runs."""

    stage: str
    config: TrainingConfig
    blueprint: Blueprint
    rows: RowPlan
    trainable: int
    """Numbers that learn."""

    @property
    def data_ranks(self) -> int:
        """Ranks that compute different rows."""
        engine = self.config.engine
        shared = engine.tensor_parallel * engine.pipeline_parallel * engine.sequence_parallel
        return self.config.workers.count // shared

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, padding included."""
        return self.config.batch_size * self.rows.sequences * self.rows.length

    @property
    def steps(self) -> int | None:
        """Optimizer steps; None where epochs of rows are asked for that are not made yet."""
        if self.config.epochs is None:
            return self.config.steps
        if self.rows.available is None:
            return None
        return max(1, math.ceil(self.config.epochs * self.rows.available / self.config.batch_size))

    @property
    def flops(self) -> float:
        """Floating-point operations a token, forward and backward."""
        return count_flops(self.blueprint, self.rows.length)

    def explain_model(self, source: str) -> Lines:
        b = self.blueprint
        shared = f" ({b.kv_heads} key/value)" if b.kv_heads != b.heads else ""
        yield (
            "model",
            f"{b.model_type} ({source}): {b.layers} layers, width {b.width:,}, {b.heads} heads"
            f"{shared}, inner width {b.inner:,}, vocabulary {b.vocab_size:,}, "
            f"context {b.context:,}",
        )
        yield "parameters", f"{b.total:,}; {b.non_embedding:,} outside embedding and head"
        if self.config.peft != "none":
            share = self.trainable / b.total
            yield "trainable", f"{self.trainable:,} ({share:.3%}) by peft={self.config.peft}"
        yield (
            "FLOPs",
            f"{scale(self.flops)} a token = 6 N + 12 L H Q T (PaLM, appendix B; Kaplan et al., "
            f"2020), N = {b.multiplied:,} without looked-up tables, "
            f"L H Q = {b.layers * b.heads * b.head_size:,}, T = {self.rows.length:,}",
        )

    def explain_batch(self) -> Lines:
        config, engine = self.config, self.config.engine
        largest = -(-config.batch_size // self.data_ranks)
        pieces = -(-largest // config.micro_batch_size)
        micro = -(-largest // pieces)
        each = f" x {self.rows.sequences} sequences" if self.rows.sequences > 1 else ""
        even = config.batch_size == self.data_ranks * micro * pieces
        yield (
            "batch",
            f"{self.step_tokens:,} tokens a step {'=' if even else '<'} {self.data_ranks} data "
            f"ranks x {micro} rows at once x {pieces} accumulated{each} x "
            f"{self.rows.length:,} tokens",
        )
        if config.batch_size < self.data_ranks:
            idle = self.data_ranks - config.batch_size
            yield "", f"{idle} of {self.data_ranks} data ranks have NOTHING TO DO; raise batch_size"
        elif not even:
            yield "", f"{config.batch_size} rows do not divide evenly: some ranks compute fewer"
        if config.workers.count > self.data_ranks:
            yield (
                "",
                f"{self.data_ranks} data ranks = {config.workers.count} ranks / "
                f"({engine.tensor_parallel} tensor x {engine.pipeline_parallel} pipeline x "
                f"{engine.sequence_parallel} sequence parallel)",
            )

    def explain_length(self) -> Lines:
        steps, rows = self.steps, self.rows
        if steps is None:
            yield "run", f"{self.config.epochs:g} epochs; steps are known when the rows are made"
            return
        tokens = steps * self.step_tokens
        yield (
            "run",
            f"{steps:,} steps x {self.step_tokens:,} = {scale(tokens)} tokens = "
            f"{scale(tokens * self.flops)} FLOPs",
        )
        if self.stage == "pretrain":
            parameters = self.blueprint.total
            budget = CHINCHILLA * parameters
            yield (
                "Chinchilla",
                f"{scale(budget)} tokens, {CHINCHILLA} a parameter (Hoffmann et al., 2022); this "
                f"run: {tokens / parameters:.2g} a parameter, {tokens / budget:.0%} of it",
            )
        if rows.tokens and rows.available:
            yield (
                "corpus",
                f"{scale(rows.tokens)} tokens in {rows.available:,} rows: "
                f"{steps * self.config.batch_size / rows.available:.2f} epochs",
            )

    def explain_memory(self) -> Lines:
        engine, checkpointing = self.config.engine, self.config.engine.activation_checkpointing
        found, other = self.estimate(checkpointing), self.estimate(not checkpointing)
        zero = engine.zero_stage if engine.backend == "deepspeed" else 0
        host = f", and {size(found.host)} on the host" if found.host else ""
        yield (
            "memory",
            f"about {size(found.device)} a rank{host}: weights {size(found.weights)}, gradients "
            f"{size(found.gradients)}, optimizer {size(found.optimizer)} ({engine.dtype}, "
            f"ZeRO-{zero}), activations {size(found.activations)}, logits in pieces "
            f"{size(found.logits)}",
        )
        how = "without" if checkpointing else "with"
        yield "", f"{size(other.device)} {how} activation checkpointing"
        yield "", f"{size(found.built)} of the host's a rank, while the model is built"

    def estimate(self, checkpointing: bool) -> Memory:
        """Memory of a rank."""
        config = self.config
        engine = config.engine.model_copy(update={"activation_checkpointing": checkpointing})
        quantised = (config.adapter.quantization or "nf4") if config.peft == "qlora" else None
        largest = -(-config.batch_size // self.data_ranks)
        return estimate(
            self.blueprint,
            self.trainable,
            engine,
            self.data_ranks,
            min(config.micro_batch_size, largest) * self.rows.sequences,
            self.rows.length,
            config.isolate_documents if isinstance(config, PretrainConfig) else True,
            quantised,
            -(-largest // config.micro_batch_size),
        )

    def explain_disk(self, free: int) -> Lines:
        """A checkpoint is the model for use, and what resuming needs: float32 weights and their
        moments. `free` is in bytes."""
        keep = self.config.checkpoints.keep
        model = result = SIZES[self.config.engine.dtype] * self.trainable
        folded = ""
        if self.config.peft in FOLDABLE:
            result += SIZES[self.config.engine.dtype] * self.blueprint.total
            folded = f" ({size(result)}: the adapter, and the model with it folded in)"
        checkpoint = model + 12 * self.trainable
        needed = (keep + 1) * checkpoint + result
        enough = "" if needed < free else ": NOT ENOUGH; lower checkpoints.keep, or make room"
        yield (
            "disk",
            f"{size(checkpoint)} a checkpoint, {size(needed)} for {keep}, one in the making and "
            f"the result{folded}; {size(free)} free{enough}",
        )

    def explain_time(self, speed: float | None, place: Path) -> Lines:
        """`speed` in tokens a second, as measured in the run `place`."""
        if speed is None or self.steps is None:
            yield "time", "known once a run of this model has been measured here"
            return
        seconds = self.steps * self.step_tokens / speed
        took = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"
        yield "time", f"{took} at the {speed:,.0f} tokens a second that {place} has measured"


def scale(number: float) -> str:
    """Three digits and a letter: 2.46 G."""
    letters = ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"))
    for power, letter in letters:
        if number >= 10**power:
            return f"{number / 10**power:.3g} {letter}"
    return f"{number:,.0f}"


def size(amount: float) -> str:
    """Bytes as GiB or MiB."""
    if amount >= GIB / 10:
        return f"{amount / GIB:,.1f} GiB"
    return f"{amount / 2**20:,.1f} MiB"
