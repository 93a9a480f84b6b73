"""Knobs of every training stage: what all share, and those of `pretrain` and `sft`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from raylign.config.model import ModelConfig
from raylign.config.section import Count, Section, Share

PeftKind = Literal["none", "lora", "qlora", "dora", "loraplus", "vera", "loha", "prefix", "prompt"]


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(default=3e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, on matrices only."""
    clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""


class ScheduleConfig(Section):
    """Learning rate over the steps, as a fraction of the peak."""

    shape: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """`wsd` is warm-up, stable, decay."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Linear warm-up from zero; when not given 20, or a tenth of the steps where that is less."""
    final_ratio: float = Field(default=0.1, ge=0, le=1)
    """Rate at the last step."""
    decay_share: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps in which `wsd` decays."""


def check_warmup(schedule: ScheduleConfig, length: str, steps: int) -> None:
    """Raises `ValueError` for a warm-up that is given and does not end before the last of `steps`
    does. `length`: the key and value that say how many there are."""
    if schedule.warmup_steps is not None and schedule.warmup_steps >= steps:
        raise ValueError(
            f"schedule.warmup_steps={schedule.warmup_steps} never reaches the peak rate in "
            f"{length}; lower it, or train longer"
        )


class EngineConfig(Section):
    """What computes gradients and steps, and how it is spread over ranks.

    Ranks that are not needed for tensor, pipeline or sequence parallelism are data parallel.
    """

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """`torch` is plain replicas, for tests and small runs."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What data-parallel ranks share out: optimizer state (1), gradients (2), weights (3)."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep optimizer state, or with ZeRO-3 the weights as well, in the memory of the CPU."""
    tensor_parallel: Count = 1
    """Ranks that share every matrix."""
    pipeline_parallel: Count = 1
    """Ranks that share the layers."""
    sequence_parallel: Count = 1
    """Ranks that share every sequence (Ulysses)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations; optimizer state stays float32."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    compile: bool = False
    """Compile the decoder's layers with torch.compile: for GPUs; the first steps take minutes."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait in a collective before the group is declared hung."""

    @model_validator(mode="after")
    def _check_compile(self) -> EngineConfig:
        shared = max(self.tensor_parallel, self.pipeline_parallel, self.sequence_parallel) > 1
        if self.compile and (shared or (self.backend == "deepspeed" and self.zero_stage == 3)):
            raise ValueError(
                "compile needs every rank to have whole layers: leave it false with zero_stage=3 "
                "and with tensor, pipeline or sequence parallelism"
            )
        return self


class WorkersConfig(Section):
    """Size of a worker group."""

    count: Count = 2
    """Ranks."""
    cpus: float = Field(default=1.0, ge=0)
    """Ray CPUs a rank."""
    gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs a rank."""
    threads: Count = 1
    """Torch threads a rank."""
    max_failures: int = Field(default=2, ge=0)
    """Restarts of the group before the job gives up."""


class CheckpointConfig(Section):
    """What is saved on the way, besides the model at the end."""

    keep: Count = 2
    """Newest verified checkpoints that stay."""
    asynchronous: bool = True
    """Write while training goes on; only the copy into memory is waited for."""
    after: Literal["none", "models", "all"] = "none"
    """What stays when the stage is finished: nothing, each checkpoint's `hf/`, or all of it."""
    resume: Literal["auto", "never"] = "auto"
    """Go on from the newest checkpoint of an interrupted run of the same settings."""
    adopt: Path | None = None
    """Begin with this checkpoint of another run of the same model, whatever its settings were."""


class AdapterConfig(Section):
    """How `peft` adapts the model; keys that a method has no use for must not be given."""

    rank: Count | None = None
    """Width of the low-rank update (lora, qlora, dora, loraplus 16; vera 64; loha 8)."""
    alpha: float | None = Field(default=None, gt=0)
    """The update is scaled by alpha / rank; twice the rank when not given."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: tuple[str, ...] | Literal["all-linear", "attention", "mlp"] = "all-linear"
    """Which matrices: names of modules, or a family of them."""
    rs_lora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski, 2023)."""
    lr_ratio: float | None = Field(default=None, gt=0)
    """LoRA+: learning rate of B over that of A (16)."""
    virtual_tokens: Count | None = None
    """prefix and prompt: length of what is learned in front of the text (16)."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """qlora: type of the frozen weights (nf4)."""


_LORA = ("lora", "qlora", "dora", "loraplus")
ADAPTER_KEYS: dict[str, tuple[str, ...]] = {
    "rank": (*_LORA, "vera", "loha"),
    "alpha": (*_LORA, "loha"),
    "dropout": (*_LORA, "vera"),
    "targets": (*_LORA, "vera", "loha"),
    "rs_lora": _LORA,
    "lr_ratio": ("loraplus",),
    "virtual_tokens": ("prefix", "prompt"),
    "quantization": ("qlora",),
}
"""Which methods have a use for a key of `AdapterConfig`."""


class TrainingConfig(Section):
    """What every training stage has."""

    steps: Count = 200
    """Optimizer steps."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the rows, in place of `steps`."""
    batch_size: Count = 24
    """Rows a step, over all ranks."""
    micro_batch_size: Count = 12
    """Rows a rank computes at once."""
    peft: PeftKind = "none"
    """Train a small adapter in place of all weights."""
    adapter: AdapterConfig = AdapterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    workers: WorkersConfig = WorkersConfig()
    checkpoint_every: Count = 100
    """Steps between checkpoints, validation and samples."""
    checkpoints: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _check_length(self) -> TrainingConfig:
        if self.epochs is not None and "steps" in self.model_fields_set:
            raise ValueError("give steps or epochs, not both")
        if self.epochs is None:  # else it is known when the rows are
            check_warmup(self.schedule, f"steps={self.steps}", self.steps)
        return self

    @model_validator(mode="after")
    def _check_peft(self) -> TrainingConfig:
        check_peft(self.peft, self.adapter, self.engine)
        return self


def check_peft(peft: PeftKind, adapter: AdapterConfig, engine: EngineConfig) -> None:
    """Raises `ValueError` for keys of `adapter` that have no effect with `peft`, and for engines
    that it cannot be trained on."""
    for name in sorted(adapter.model_fields_set):
        if peft not in ADAPTER_KEYS[name]:
            raise ValueError(
                f"adapter.{name} has no effect with peft={peft}; leave it out, or choose peft from "
                f"{', '.join(ADAPTER_KEYS[name])}"
            )
    if peft == "none":
        return
    works = {
        "tensor_parallel": False,
        "pipeline_parallel": peft == "lora",
        "sequence_parallel": peft != "prefix",
    }
    for key, possible in works.items():
        if getattr(engine, key) > 1 and not possible:
            raise ValueError(f"peft={peft} does not work with engine.{key}; set it to 1")
    if peft == "prefix" and engine.activation_checkpointing:
        raise ValueError(
            "peft=prefix needs keys and values that engine.activation_checkpointing does not keep; "
            "set it to false, or choose peft=prompt"
        )


class PretrainConfig(TrainingConfig):
    """`python -m jobs.pretrain`: next-token prediction on packed shards."""

    corpus: Path | None = None
    """Packed shards; the run's own `shards` stage when not given."""
    tokenizer: Path | None = None
    """Tokenizer directory; the run's own `tokenizer` stage when not given."""
    model: ModelConfig | str = ModelConfig()
    """A shape or a preset's name to initialise; or a directory, or a hub name, to continue from."""
    steps: Count = 300
    """Optimizer steps."""
    batch_size: Count = 32
    """Packed rows a step, over all ranks."""
    micro_batch_size: Count = 16
    """Packed rows a rank computes at once."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens in a row; must divide that of the shards, and is theirs when not given."""
    isolate_documents: bool = True
    """No attention across the documents of a packed row."""
    sample_prompts: tuple[str, ...] = ("Return the ", "What is 12 + 7? ", "To add, ")
    """Continued at every checkpoint."""
    sample_tokens: Count = 48
    """Tokens of each continuation."""
    sample_temperature: float = Field(default=0.0, ge=0)
    """Of the continuations; 0 is greedy."""


class SftConfig(TrainingConfig):
    """`python -m jobs.sft`: demonstrations, loss on what the assistant says."""

    model: str | None = None
    """Directory with weights and tokenizer, or a hub name; the run's own `pretrain` stage when not
    given."""
    data: Path | None = None
    """JSON lines, JSON or Parquet; the `corpus` stage's exercises when not given."""
    format: Literal["auto", "messages", "prompt-completion", "alpaca", "sharegpt"] = "auto"
    """Columns of the data; `auto` recognises them in the first rows and says what it found."""
    train_on: tuple[Literal["assistant", "user", "system", "tool"], ...] = ("assistant",)
    """Roles whose words are trained."""
    sequence_length: int = Field(default=256, ge=8)
    """Tokens in a row."""
    packing: bool = True
    """Several conversations share a row and do not see each other."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What happens to conversations longer than a row; both are counted."""
    max_rejected_share: Share = 0.05
    """More unusable rows than this stop the job."""
    neftune_alpha: float = Field(default=0.0, ge=0)
    """Noise on the embeddings in training (NEFTune; Jain et al., 2023); 0 is none."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3)
    """AdamW."""
    validation_share: float = Field(default=0.02, gt=0, lt=1)
    """Share of conversations kept for validation loss."""
    sample_prompts: tuple[str, ...] = ("What is 12 + 7?", "Work out 431 - 58.")
    """Questions answered greedily at every checkpoint."""
    sample_tokens: Count = 64
    """Tokens of each answer."""
