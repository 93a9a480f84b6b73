"""Knobs of `compare`: a model's own completions, judged, as pairs to learn from."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from raylign.config.rewarding import JudgeConfig, QuestionConfig, RewardConfig
from raylign.config.rollouts import RolloutConfig, SamplingConfig
from raylign.config.section import Count, Section


class VerdictsConfig(QuestionConfig):
    """Demonstrations to train a judge with: the question about each completion, or pair of them,
    and the verdict that its reward stands for. `align.judge` asks a judge that learnt from them the
    same way with the same keys and `brief: true`."""

    scale: tuple[int, int] = (0, 1)
    """Marks of the rewards 0 and 1; those between get the nearest."""

    @model_validator(mode="after")
    def _check_mode(self) -> VerdictsConfig:
        if self.compare and "scale" in self.model_fields_set:
            raise ValueError("scale has no effect with compare=true; leave it out")
        return self


class CompareConfig(Section):
    """`python -m jobs.compare`: completions of one prompt, a better and a worse one."""

    model: Path | None = None
    """Directory with weights and tokenizer; the run's own `sft` stage when not given."""
    prompts: Path | None = None
    """JSON lines with `prompt` and `reference`; the `corpus` stage's when not given."""
    limit: int | None = Field(default=None, ge=1)
    """So many prompts, drawn by the recipe's seed; all when not given."""
    completions: int = Field(default=8, ge=2)
    """Completions a prompt."""
    pairs: Count = 1
    """Pairs a prompt, at most: the best with the worst, the next best with the next worst."""
    least_gap: float = Field(default=0.0, ge=0)
    """The two rewards of a pair differ by more than this."""
    verdicts: VerdictsConfig | None = None
    """Write demonstrations for a judge too."""
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    judge: JudgeConfig = JudgeConfig()

    @model_validator(mode="after")
    def _check(self) -> CompareConfig:
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 gives the same completion every time")
        if 2 * self.pairs > self.completions:
            raise ValueError(f"pairs={self.pairs} needs {2 * self.pairs} completions or more")
        placed = self.judge.model is not None or self.judge.endpoint is not None
        if self.reward.judged and not placed:
            raise ValueError("reward.source=judge: give judge.model or judge.endpoint")
        return self
