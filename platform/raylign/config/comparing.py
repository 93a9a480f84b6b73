"""Knobs of `compare`: a model's own completions, judged, as pairs to learn from."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from raylign.config.rewarding import JudgeConfig, RewardConfig
from raylign.config.rollouts import RolloutConfig, SamplingConfig
from raylign.config.section import Count, Section


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
