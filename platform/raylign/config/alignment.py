"""Knobs of `align`: reinforcement learning on rollout, reward and learner actors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raylign.config.section import Section
from raylign.config.training import (
    AdapterConfig,
    EngineConfig,
    OptimizerConfig,
    ScheduleConfig,
    check_peft,
    check_warmup,
)

Count = Annotated[int, Field(ge=1)]


class SamplingConfig(Section):
    """How completions are drawn."""

    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus mass."""
    top_k: int = Field(default=0, ge=0)
    """0 keeps the whole vocabulary."""
    max_tokens: Count = 96
    """Longest completion."""


class AlgorithmConfig(Section):
    """A row of the algorithm catalog; a coefficient not given is the one its authors used."""

    name: str = "grpo"
    """Row of `raylign.algorithms.catalog`."""
    clip_low: float | None = Field(default=None, gt=0, le=1)
    """Policy ratio is clipped below at 1 - clip_low."""
    clip_high: float | None = Field(default=None, gt=0)
    """Policy ratio is clipped above at 1 + clip_high."""
    kl_coef: float | None = Field(default=None, ge=0)
    """Weight of KL(policy || reference) in the loss; 0 needs no reference."""
    entropy_coef: float | None = Field(default=None, ge=0)
    """Weight of the entropy bonus."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Truncation of the learner/rollout importance ratio."""
    updates_per_batch: Count = 1
    """Optimizer steps on each batch of trajectories."""


class RolloutConfig(Section):
    """vLLM workers that generate."""

    count: Count = 2
    """Workers."""
    cpus: float = Field(default=0.5, ge=0)
    """Ray CPUs a worker."""
    gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs a worker."""
    threads: Count = 1
    """Threads of a CPU worker."""
    backend: Literal["vllm", "transformers"] = "vllm"
    """`transformers` is slow and needs nothing beyond torch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the served weights."""
    kv_cache_mb: Count = 256
    """KV cache of a CPU worker, in MiB."""
    max_sequences: Count = 256
    """Sequences decoded at once."""
    start_deadline_s: float = Field(default=300.0, gt=0)
    """A worker that has not loaded its model by then is replaced."""
    deadline_s: float = Field(default=120.0, gt=0)
    """A worker that has not answered a request by then is replaced."""
    max_restarts: int = Field(default=3, ge=0)
    """Replacements over the whole run before it gives up."""
    canary_tolerance: float = Field(default=1e-2, gt=0)
    """Largest mean |logprob difference| to the learner that may serve after a weight sync."""


class RewardConfig(Section):
    """What scores trajectories."""

    source: str = "arithmetic"
    """A verifier's name, or `module:function` taking (completion, reference)."""
    count: Count = 1
    """Workers."""
    cpus: float = Field(default=0.2, ge=0)
    """Ray CPUs a worker."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Longest scoring of one batch."""
    weights: dict[str, float] = Field(default={"correct": 1.0, "format": 0.1})
    """Weight of each named part in the total."""


class LearnerConfig(Section):
    """Ranks that learn."""

    count: Count = 2
    """Ranks."""
    cpus: float = Field(default=0.4, ge=0)
    """Ray CPUs a rank."""
    gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs a rank."""
    threads: Count = 1
    """Torch threads a rank."""
    token_budget: Count = 8192
    """Padded tokens a rank computes at once."""


class AlignConfig(Section):
    """`python -m jobs.align`: prompts, rollouts, rewards, updates, weight sync."""

    model: Path | None = None
    """Directory with weights and tokenizer; the run's own `sft` stage when not given."""
    prompts: Path | None = None
    """JSON lines with `prompt` and `reference`; the `corpus` stage's when not given."""
    steps: Count = 40
    """Policy versions to publish."""
    prompts_per_step: Count = 64
    """Prompts a step."""
    group_size: int = Field(default=8, ge=2)
    """Completions a prompt."""
    max_staleness: int = Field(default=1, ge=0)
    """Policy versions a sample may lag behind the learner; 0 is synchronous."""
    peft: Literal["none", "lora", "qlora", "dora"] = "none"
    """Train a small adapter in place of all weights; what is published has it folded in, and the
    reference is the policy without it."""
    adapter: AdapterConfig = AdapterConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    learner: LearnerConfig = LearnerConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-4, weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig(shape="constant", warmup_steps=2)
    engine: EngineConfig = EngineConfig()
    mismatch_sample: int = Field(default=32, ge=0)
    """Trajectories a step whose rollout logprobs are recomputed at their own version."""
    examples_every: Count = 5
    """Steps between saved example rollouts."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between saved policies besides the last; 0 saves the last only."""

    @model_validator(mode="after")
    def _check_engine(self) -> AlignConfig:
        for key in ("tensor_parallel", "pipeline_parallel", "sequence_parallel"):
            if getattr(self.engine, key) > 1:
                raise ValueError(
                    f"engine.{key}: every learner trains on trajectories of its own; set it to 1, "
                    "and share weights out with engine.zero_stage=3"
                )
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> AlignConfig:
        if "schedule" in self.model_fields_set:
            check_warmup(self.schedule, f"steps={self.steps}", self.steps)
        return self

    @model_validator(mode="after")
    def _check_peft(self) -> AlignConfig:
        check_peft(self.peft, self.adapter, self.engine)
        if self.adapter.dropout:
            raise ValueError(
                "adapter.dropout would train another policy than the one that samples; leave it out"
            )
        return self
