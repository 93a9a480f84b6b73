"""Knobs of what a trajectory is worth: verifiers, code, reward models and judges, and their sum."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from raylign.config.rollouts import RolloutConfig
from raylign.config.section import Count, Section

Value = bool | int | float | str


class RewardPartConfig(Section):
    """One source of rewards among several."""

    source: str
    """A verifier's name, `module:function` taking (completion, reference), `model` or `judge`."""
    weight: float = 1.0
    """Factor of its number in the total; of its part `score`, `correct`, or the only one."""
    model: Path | None = None
    """source=model: a stage of `jobs.reward_model`, or a directory with a scoring model."""
    options: dict[str, Value] = Field(default={})
    """Keyword arguments of a verifier that takes some, as `pattern` of `regex`."""

    @model_validator(mode="after")
    def _check_model(self) -> RewardPartConfig:
        if (self.source == "model") != (self.model is not None):
            raise ValueError("source=model and model: DIRECTORY go together")
        return self


class ShapingConfig(Section):
    """What is done to the total of a trajectory, in this order."""

    overlong_margin: int = Field(default=0, ge=0)
    """Last so many tokens of the longest completion lose up to `overlong_penalty` (DAPO)."""
    overlong_penalty: float = Field(default=1.0, gt=0)
    """Largest penalty of an overlong completion."""
    length_coef: float = Field(default=0.0, ge=0)
    """Taken off for each sampled token."""
    scale: Literal["none", "running"] = "none"
    """running: over the standard deviation of all rewards so far."""
    clip: tuple[float, float] | None = None
    """Lowest and highest total."""

    @model_validator(mode="after")
    def _check_clip(self) -> ShapingConfig:
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip={list(self.clip)}: give the lower bound first")
        return self


class SandboxConfig(Section):
    """Limits of a completion's code when `code` runs it."""

    seconds: float = Field(default=5.0, gt=0)
    """Of wall time, for all tests of a completion."""
    memory_mb: Count = 512
    """Address space."""
    output_kb: Count = 64
    """Of what it prints; the rest is thrown away."""
    files_mb: Count = 16
    """Largest file that it may write."""
    unsafe: bool = False
    """Run code on a kernel that cannot confine it."""


class RewardConfig(Section):
    """What scores trajectories."""

    source: str = "arithmetic"
    """A verifier's name, or `module:function` taking (completion, reference); `judge`,
    `environment`, or `model` with `model`."""
    model: Path | None = None
    """source=model: a stage of `jobs.reward_model`, or a directory with a scoring model."""
    options: dict[str, Value] = Field(default={})
    """Keyword arguments of a verifier that takes some, as `pattern` of `regex`."""
    parts: dict[str, RewardPartConfig] = Field(default={})
    """Several sources by name, in place of `source`; their weighted sum is the total."""
    weights: dict[str, float] = Field(default={})
    """source: weight of each of its named parts; not given, 1 for `correct` and 0.1 for `format`
    where it has those."""
    shaping: ShapingConfig = ShapingConfig()
    sandbox: SandboxConfig = SandboxConfig()
    count: Count = 1
    """Workers."""
    cpus: float = Field(default=0.1, ge=0)
    """Ray CPUs a worker."""
    gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs a worker; for reward models."""
    threads: Count = 1
    """Torch threads of a reward model."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Longest scoring of one group; programs and mathematics have limits of their own on top."""
    attempts: Count = 3
    """Times that a group is given to a worker before it is set aside; a worker that died or timed
    out says nothing about the completions."""
    max_restarts: int = Field(default=100, ge=0)
    """Workers replaced over the whole run before it gives up."""

    @model_validator(mode="after")
    def _check_sources(self) -> RewardConfig:
        if self.parts:
            extra = sorted(self.model_fields_set & {"source", "model", "options", "weights"})
            if extra:
                raise ValueError(f"{extra[0]} has no effect beside parts; give it inside of one")
        elif (self.source == "model") != (self.model is not None):
            raise ValueError("source=model and model: DIRECTORY go together")
        return self

    @property
    def judged(self) -> bool:
        """Whether a judge is among the sources."""
        return self.uses("judge")

    def uses(self, source: str) -> bool:
        """Whether a source is among them."""
        if self.parts:
            return any(part.source == source for part in self.parts.values())
        return self.source == source


class QuestionConfig(Section):
    """What a judge is asked of completions."""

    compare: bool = False
    """Compare the completions of a prompt in pairs; score each by itself when false."""
    rubric: str = "helpful"
    """Name of a rubric, or a text that says what is good, or its file: with {prompt}, {completion}
    (compare: {first}, {second}) and, where wanted, {reference}."""
    scale: tuple[int, int] = (1, 10)
    """Lowest and highest mark; brought to 0..1."""

    @model_validator(mode="after")
    def _check_scale(self) -> QuestionConfig:
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale={list(self.scale)}: give the lowest mark first")
        return self


class JudgeConfig(QuestionConfig):
    """A language model that scores or compares completions (RLAIF)."""

    model: Path | None = None
    """Directory of the judge, served by vLLM workers of its own."""
    endpoint: str | None = None
    """URL of an OpenAI-compatible service, up to and including /v1, in place of `model`."""
    endpoint_model: str | None = None
    """Name of the model there."""
    key_file: Path | None = None
    """File that holds the endpoint's API key; never a key itself."""
    brief: bool = False
    """Ask with the rubric and the texts alone, and for a verdict without its reason: for a model
    that learnt to judge from the demonstrations of `compare.verdicts`."""
    both_orders: bool = True
    """compare: judge each pair in both orders; verdicts that contradict each other are a tie."""
    pairs: int = Field(default=0, ge=0)
    """compare: pairs a group; 0 is every completion against the next, in a circle."""
    samples: Count = 1
    """Independent verdicts that are averaged."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    max_tokens: Count = 256
    """Longest verdict."""
    attempts: Count = 3
    """Times that an unreadable verdict or a failed call is asked for again, beyond the first."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait for one verdict."""
    concurrency: Count = 32
    """Calls in flight."""
    max_calls: int | None = Field(default=None, ge=1)
    """Calls of the whole run; completions beyond are set aside."""
    cache: bool = True
    """Ask once about the same text; kept in the stage, also over restarts."""
    rollout: RolloutConfig = RolloutConfig(count=1)
    """Workers of `model`."""
    most: Count = 4
    """model: workers that a growing queue may add."""
    scale_queue: Count = 64
    """model: waiting calls a worker before one more is started."""

    @model_validator(mode="after")
    def _check_place(self) -> JudgeConfig:
        if self.model is not None and self.endpoint is not None:
            raise ValueError("give model or endpoint, not both")
        if (self.endpoint is None) != (self.endpoint_model is None):
            raise ValueError("endpoint and endpoint_model go together")
        if self.key_file is not None and self.endpoint is None:
            raise ValueError("key_file has no effect without endpoint")
        return self
