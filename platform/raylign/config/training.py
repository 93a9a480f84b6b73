"""Knobs of `pretrain` and `sft`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raylign.config.section import Section

Count = Annotated[int, Field(ge=1)]


class ModelConfig(Section):
    """A Llama-style decoder (RoPE, RMSNorm, SwiGLU, GQA) as a plain transformers config."""

    hidden_size: Count = 128
    """Width of the residual stream."""
    layers: Count = 4
    """Decoder blocks."""
    heads: Count = 4
    """Query heads; must divide `hidden_size`."""
    kv_heads: Count = 2
    """Key/value heads; must divide `heads`."""
    ffn_size: Count = 384
    """Inner width of the SwiGLU block."""
    context: Count = 512
    """Longest sequence, in tokens."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""
    tie_embeddings: bool = True
    """Share the input and output embedding."""

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.hidden_size % self.heads:
            raise ValueError(f"heads={self.heads} must divide hidden_size={self.hidden_size}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        return self


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
    warmup_steps: int = Field(default=20, ge=0)
    """Linear warm-up from zero."""
    final_ratio: float = Field(default=0.1, ge=0, le=1)
    """Rate at the last step."""
    decay_share: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps in which `wsd` decays."""


class EngineConfig(Section):
    """What computes gradients and steps."""

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """`torch` is a plain single-process engine for tests and small runs."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations; optimizer state stays float32."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait in a collective before the group is declared hung."""


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


class PretrainConfig(Section):
    """`python -m jobs.pretrain`: next-token prediction on packed shards."""

    corpus: Path | None = None
    """Packed shards; the run's own `shards` stage when not given."""
    tokenizer: Path | None = None
    """Tokenizer directory; the run's own `tokenizer` stage when not given."""
    model: ModelConfig | Path = ModelConfig()
    """A shape to initialise, or a directory with weights to continue from."""
    steps: Count = 300
    """Optimizer steps."""
    batch_size: Count = 32
    """Packed rows a step, over all ranks."""
    micro_batch_size: Count = 16
    """Packed rows a rank computes at once."""
    isolate_documents: bool = True
    """No attention across the documents of a packed row."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    workers: WorkersConfig = WorkersConfig()
    checkpoint_every: Count = 100
    """Steps between checkpoints, validation and samples."""
    sample_prompts: tuple[str, ...] = ("Return the ", "What is 12 + 7? ", "To add, ")
    """Continued greedily at every checkpoint."""
    sample_tokens: Count = 48
    """Tokens of each continuation."""


class SftConfig(Section):
    """`python -m jobs.sft`: chat demonstrations, loss on the assistant's tokens only."""

    model: Path | None = None
    """Directory with weights and tokenizer; the run's own `pretrain` stage when not given."""
    data: Path | None = None
    """JSON lines with a `messages` column; the `corpus` stage's exercises when not given."""
    steps: Count = 200
    """Optimizer steps."""
    batch_size: Count = 24
    """Packed rows a step, over all ranks."""
    micro_batch_size: Count = 12
    """Packed rows a rank computes at once."""
    sequence_length: int = Field(default=256, ge=8)
    """Tokens in a packed row; longer conversations are rejected and counted."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3)
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    workers: WorkersConfig = WorkersConfig()
    checkpoint_every: Count = 100
    """Steps between checkpoints, validation and samples."""
    validation_share: float = Field(default=0.02, gt=0, lt=1)
    """Share of conversations kept for validation loss."""
    sample_prompts: tuple[str, ...] = ("What is 12 + 7?", "Work out 431 - 58.")
    """Questions answered greedily at every checkpoint."""
    sample_tokens: Count = 64
    """Tokens of each answer."""
