"""Knobs of `align`: reinforcement learning on rollout, reward, judge and learner actors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from raylign.config.algorithm import AlgorithmConfig
from raylign.config.rewarding import JudgeConfig, RewardConfig
from raylign.config.rollouts import (
    EnvironmentConfig,
    RolloutConfig,
    SamplingConfig,
    ScalingConfig,
    TransferConfig,
)
from raylign.config.section import Count, Section
from raylign.config.training import (
    AdapterConfig,
    CheckpointConfig,
    EngineConfig,
    OptimizerConfig,
    ScheduleConfig,
    check_peft,
    check_warmup,
)

SERVED_RANK = 512
"""Largest rank of an adapter that vLLM (0.32) serves beside a base."""


class LearnerConfig(Section):
    """Ranks that learn."""

    count: Count = 2
    """Ranks."""
    cpus: float = Field(default=0.3, ge=0)
    """Ray CPUs a rank."""
    gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs a rank."""
    threads: Count = 1
    """Torch threads a rank."""
    token_budget: Count = 8192
    """Padded tokens a rank computes at once."""
    deadline_s: float = Field(default=1800.0, gt=0)
    """Longest update, publication or save; a rank that hangs is found by engine.timeout_s."""
    start_deadline_s: float = Field(default=300.0, gt=0)
    """Longest start of the group."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts of the group over the whole run before it gives up."""


class CriticConfig(Section):
    """The value function of algorithms that have one."""

    model: Path | None = None
    """What it is made from: a reward model's stage, or any model; the policy when not given."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, weight_decay=0.0)
    """AdamW of the critic."""
    warmup_steps: int = Field(default=0, ge=0)
    """First steps in which the critic alone learns."""


class GuardConfig(Section):
    """What counts as a collapse, and what is then done."""

    action: Literal["rollback", "stop", "warn"] = "rollback"
    """rollback: back to the last good checkpoint, with other samples and half the learning rate."""
    max_rollbacks: int = Field(default=2, ge=0)
    """Before the run stops after all."""
    window: Count = 5
    """Steps whose mean is judged."""
    min_entropy: float | None = Field(default=None, gt=0)
    """Nats a token, below which the policy has collapsed."""
    max_kl: float | None = Field(default=None, gt=0)
    """Nats a token from the reference, above which the policy has run away."""
    min_length: float | None = Field(default=None, gt=0)
    """Sampled tokens, below which completions have shrunk to nothing."""
    max_truncated: float | None = Field(default=None, gt=0, le=1)
    """Share of completions cut off at their longest."""


class SinksConfig(Section):
    """Where metrics go besides the stage's own files; none of them can fail the run."""

    tensorboard: bool = True
    """Event files in the stage's directory."""
    wandb: str | None = None
    """Project of Weights & Biases; wandb must be installed."""
    mlflow: str | None = None
    """Experiment of MLflow; mlflow must be installed."""
    trackio: str | None = None
    """Project of Trackio; trackio must be installed."""


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
    group_size: Count = 8
    """Completions a prompt."""
    max_staleness: int = Field(default=1, ge=0)
    """Policy versions a sample may lag behind the learner; 0 is synchronous, and the same to the
    bit whenever it is run again."""
    in_flight: Literal["continue", "restart"] = "continue"
    """What becomes of unfinished completions when weights change under them: they go on under the
    new weights, or start over."""
    peft: Literal["none", "lora", "qlora", "dora"] = "none"
    """Train a small adapter in place of all weights; what is published has it folded in, and the
    reference is the policy without it."""
    adapter: AdapterConfig = AdapterConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    critic: CriticConfig = CriticConfig()
    sampling: SamplingConfig = SamplingConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    rollout: RolloutConfig = RolloutConfig()
    scaling: ScalingConfig = ScalingConfig()
    transfer: TransferConfig = TransferConfig()
    reward: RewardConfig = RewardConfig()
    judge: JudgeConfig = JudgeConfig()
    learner: LearnerConfig = LearnerConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-4, weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig(shape="constant", warmup_steps=2)
    engine: EngineConfig = EngineConfig()
    guard: GuardConfig = GuardConfig()
    sinks: SinksConfig = SinksConfig()
    mismatch_sample: int = Field(default=32, ge=0)
    """Trajectories a step whose rollout logprobs are recomputed at their own version."""
    examples_every: Count = 5
    """Steps between saved example rollouts."""
    checkpoint_every: Count = 10
    """Steps between checkpoints, from which a learner that died or a run that was stopped goes
    on."""
    checkpoints: CheckpointConfig = CheckpointConfig()

    @property
    def longest(self) -> int:
        """Tokens that a completion may have of the policy's own, over all turns."""
        turns = 1 if self.environment.source is None else self.environment.max_turns
        return turns * self.sampling.max_tokens

    @property
    def canary_tolerance(self) -> float:
        """Largest mean |logprob difference| of a worker that may serve a version."""
        exact = self.engine.dtype == self.rollout.dtype == "float32"
        return self.rollout.canary_tolerance or (1e-2 if exact else 1e-1)

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
        if self.transfer.adapter_only and self.peft != "lora":
            raise ValueError(
                f"transfer.adapter_only needs peft=lora, not {self.peft}; leave it out"
            )
        rank = self.adapter.rank or 0
        if self.transfer.adapter_only and self.rollout.backend == "vllm" and rank > SERVED_RANK:
            raise ValueError(
                f"adapter.rank={rank}: vLLM serves adapters up to {SERVED_RANK}; lower it, or "
                "leave transfer.adapter_only out, and the adapter is folded in"
            )
        return self

    @model_validator(mode="after")
    def _check_adopt(self) -> AlignConfig:
        if self.checkpoints.adopt is not None:
            raise ValueError("checkpoints.adopt has no effect here; give model in its place")
        return self

    @model_validator(mode="after")
    def _check_judge(self) -> AlignConfig:
        placed = self.judge.model is not None or self.judge.endpoint is not None
        if self.reward.judged and not placed:
            raise ValueError("reward.source=judge: give judge.model or judge.endpoint")
        if self.reward.uses("environment") and self.environment.source is None:
            raise ValueError("reward.source=environment: give environment.source")
        if self.judge.model_fields_set and not self.reward.judged:
            raise ValueError("judge has no effect unless reward.source, or a part's, is judge")
        return self
