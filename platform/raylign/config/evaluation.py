"""Knobs of `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raylign.config.rollouts import EnvironmentConfig
from raylign.config.section import Section

Count = Annotated[int, Field(ge=1)]


class EvaluateConfig(Section):
    """`python -m jobs.evaluate`: lm-eval tasks on models served by vLLM, side by side."""

    models: dict[str, Path] = Field(default={})
    """Name to directory; the run's own `pretrain`, `sft` and `align` stages when empty."""
    tasks: tuple[str, ...] = ("arithmetic", "english")
    """lm-eval task names; `arithmetic` and `english` are made from the run's held-out data, and so
    is `episodes`: the arithmetic, answered turn by turn in `environment`."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """tasks=episodes: what answers the model between its turns."""
    task_path: Path | None = None
    """Directory with further lm-eval task files."""
    limit: int | None = Field(default=None, ge=1)
    """Documents a task; all when not given."""
    chat: bool = True
    """Ask through the model's chat template; false prompts with plain text."""
    offline: bool = True
    """Refuse downloads; false lets lm-eval tasks fetch their data from the Hugging Face Hub."""
    max_tokens: Count = 96
    """Longest answer, for tasks that do not set their own."""
    max_length: Count = 2048
    """Longest prompt and answer together; a model with a shorter context uses its own."""
    backend: Literal["vllm", "transformers"] = "vllm"
    """What serves the model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the served weights."""
    kv_cache_mb: Count = 256
    """KV cache of a CPU worker, in MiB."""
    max_sequences: Count = 256
    """Sequences decoded at once."""
    workers: Count = 2
    """Models evaluated at the same time."""
    cpus: float = Field(default=1.0, ge=0)
    """Ray CPUs a worker."""
    gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs a worker."""
    threads: Count = 1
    """Threads of a CPU worker."""
    deadline_s: float = Field(default=3600.0, gt=0)
    """A model that is not through by then fails the job."""

    @model_validator(mode="after")
    def _check_environment(self) -> EvaluateConfig:
        if "episodes" in self.tasks and self.environment.source is None:
            raise ValueError("tasks=episodes: give environment.source")
        if "episodes" not in self.tasks and self.environment.source is not None:
            raise ValueError("environment has no effect unless tasks has episodes")
        if "episodes" in self.tasks and not self.chat:
            raise ValueError("tasks=episodes: turns need the chat template; leave chat out")
        return self
