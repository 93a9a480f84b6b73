"""Knobs of `reward_model` and `preference`: learning from comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from raylign.config.section import Count, Share
from raylign.config.training import OptimizerConfig, TrainingConfig


class ComparisonConfig(TrainingConfig):
    """What learning from comparisons has in common."""

    model: str | None = None
    """Directory with weights and tokenizer, or a hub name; the run's own `sft` stage when not
    given."""
    data: Path | None = None
    """JSON lines, JSON or Parquet; required."""
    format: str = "auto"
    """Columns of the data, a row of `raylign.data.preferences`; `auto` recognises them."""
    max_length: int = Field(default=512, ge=8)
    """Tokens of prompt and answer together."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What happens to longer ones; both are counted."""
    max_rejected_share: Share = 0.05
    """More unusable rows than this stop the job."""
    validation_share: float = Field(default=0.05, gt=0, lt=1)
    """Share of rows kept for validation."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5, weight_decay=0.0)
    """AdamW."""


class RewardModelConfig(ComparisonConfig):
    """`python -m jobs.reward_model`: a score for answers, or for their steps."""

    kind: Literal["pairs", "outcome", "process"] = "pairs"
    """`pairs`: Bradley-Terry on comparisons; `outcome`: right or wrong answers; `process`: right or
    wrong steps."""
    centring: float = Field(default=0.0, ge=0)
    """Weight of (sum of both rewards) squared, which keeps scores around 0 (Eisenstein et al.,
    2023)."""
    step_separator: str = "\n"
    """process: what closes a step."""


class PreferenceConfig(ComparisonConfig):
    """`python -m jobs.preference`: a policy from comparisons, without a reward model."""

    loss: Literal["dpo", "ipo", "kto", "orpo", "simpo", "cdpo", "robust"] = "dpo"
    """A row of `raylign.algorithms.preference`."""
    beta: float | None = Field(default=None, gt=0)
    """Strength of the pull to the reference; the authors' value when not given."""
    label_smoothing: float | None = Field(default=None, ge=0, lt=0.5)
    """cdpo, robust: share of comparisons that are assumed to be the wrong way round (0.1)."""
    simpo_margin: float | None = Field(default=None, ge=0)
    """simpo: gamma, in rewards (0.5 x beta as gamma/beta)."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen answers' own cross-entropy (RPO; Pang et al., 2024)."""
    desirable_weight: float | None = Field(default=None, gt=0)
    """kto: weight of desirable answers (1)."""
    undesirable_weight: float | None = Field(default=None, gt=0)
    """kto: weight of undesirable answers (1)."""
    reference: str | None = None
    """Directory or hub name of the reference policy; the starting model when not given."""
    sample_prompts: tuple[str, ...] = ()
    """Questions answered greedily at every checkpoint."""
    sample_tokens: Count = 64
    """Tokens of each answer."""
