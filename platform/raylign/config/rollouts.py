"""Knobs of what generates: sampling, rollout workers, environments, how many of them, and how
weights get to them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raylign.config.section import Count, Section, Share

Value = bool | int | float | str


class SamplingConfig(Section):
    """How completions are drawn."""

    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus mass."""
    top_k: int = Field(default=0, ge=0)
    """0 keeps the whole vocabulary."""
    max_tokens: Count = 96
    """Longest completion; with an environment, longest turn."""


class RolloutConfig(Section):
    """vLLM workers that generate."""

    count: Count = 2
    """Workers."""
    cpus: float = Field(default=0.2, ge=0)
    """Ray CPUs a worker; a share, so that a small machine has room for more of them."""
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
    gpu_memory_share: float = Field(default=0.9, gt=0, le=1)
    """Share of a card's memory that a GPU worker may take."""
    max_sequences: Count = 256
    """Sequences decoded at once."""
    start_deadline_s: float = Field(default=300.0, gt=0)
    """A worker that has not loaded its model by then is replaced."""
    deadline_s: float = Field(default=600.0, gt=0)
    """A request that is not answered by then is made again on another worker."""
    stall_s: float = Field(default=20.0, gt=0)
    """A worker that has work and makes no token for so long is hung, and replaced."""
    attempts: Count = 3
    """Workers that may be lost over one request before its prompt is set aside as their cause."""
    max_restarts: int = Field(default=3, ge=0)
    """Replacements over the whole run; after that, those that are left go on."""
    canary_tolerance: float | None = Field(default=None, gt=0)
    """Largest mean |logprob difference| to the learner that may serve after a weight sync; when not
    given, 0.01 where both compute in float32, and 0.1 where one of them rounds to bfloat16."""


class EnvironmentConfig(Section):
    """What answers the policy between its turns."""

    source: str | None = None
    """An environment's name, or `module:factory`; completions have one turn when not given."""
    max_turns: Count = 4
    """Turns of the policy before the episode is cut off."""
    deadline_s: float = Field(default=60.0, gt=0)
    """Longest answer; after that the episode is set aside, and never scored."""
    options: dict[str, Value] = Field(default={})
    """Keyword arguments of the factory."""

    @model_validator(mode="after")
    def _check_source(self) -> EnvironmentConfig:
        if self.source is None and self.model_fields_set - {"source"}:
            raise ValueError("give environment.source, or leave its other keys out")
        return self


class ScalingConfig(Section):
    """How many rollout workers there are while training runs; `python -m jobs.scale` overrules it
    at any time."""

    policy: Literal["fixed", "balance"] = "fixed"
    """balance adds a worker where the learner waits, and removes one where rollouts do."""
    least: Count = 1
    """balance: never fewer."""
    most: Count = 8
    """balance: never more."""
    every_steps: Count = 4
    """balance: steps between two decisions."""
    learner_waits: Share = 0.2
    """balance: share of a step that the learner waits for samples before a worker is added."""
    rollouts_wait: Share = 0.5
    """balance: share of a step that rollouts are idle before a worker is removed."""


class TransferConfig(Section):
    """How weights travel from the learner to the rollout workers."""

    transport: Literal["auto", "object_store", "shared_memory", "broadcast", "ipc"] = "auto"
    """auto: ipc where learner and worker share a card, broadcast between cards, shared_memory on
    one machine, else the object store."""
    bucket_mb: Count = 64
    """Largest piece that is gathered and sent at once."""
    deadline_s: float = Field(default=120.0, gt=0)
    """A worker that has not proved a version by then is replaced."""
    adapter_only: bool = False
    """peft=lora: send the adapter alone; workers apply it beside the base. Folded in when false."""
