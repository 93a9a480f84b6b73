"""Knobs of `reward_model` and `preference`: learning from comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from raylign.config.section import Count, Share
from raylign.config.training import OptimizerConfig, TrainingConfig


class ComparisonConfig(TrainingConfig):
    """What learning from comparisons has in common."""

    model: str | None = None
    """Directory with weights and tokenizer, or a hub name; the run's own `sft` stage when not
    given."""
    data: Path | None = None
    """JSON lines, a JSON array or Parquet; the `comparisons` stage's when not given."""
    format: str = "auto"
    """Columns of the data, a row of `raylign.data.preferences`; `auto` recognises them."""
    max_length: int = Field(default=512, ge=8)
    """Tokens of prompt and answer together."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What happens to longer ones; both are counted. `truncate` keeps the end of the prompt and the
    beginning of the answers."""
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
    step_separator: str = Field(default="\n", min_length=1)
    """process: what closes a step; its last token is where a step is scored."""

    @model_validator(mode="after")
    def _check_kind(self) -> RewardModelConfig:
        if self.centring and self.kind != "pairs":
            raise ValueError(f"centring has no effect with kind={self.kind}; leave it out")
        if "step_separator" in self.model_fields_set and self.kind != "process":
            raise ValueError(f"step_separator has no effect with kind={self.kind}; leave it out")
        return self


class PreferenceConfig(ComparisonConfig):
    """`python -m jobs.preference`: a policy from comparisons, without a reward model."""

    loss: Literal["dpo", "ipo", "kto", "orpo", "simpo", "cdpo", "robust"] = "dpo"
    """A row of `raylign.algorithms.preference`."""
    beta: float | None = Field(default=None, gt=0)
    """Strength of the pull to the reference; the authors' value when not given."""
    label_smoothing: float | None = Field(default=None, ge=0, lt=0.5)
    """cdpo, robust: share of comparisons that are assumed to be the wrong way round (0.1)."""
    simpo_margin: float | None = Field(default=None, ge=0)
    """simpo: by how much the chosen answer's reward should be larger (half of beta)."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Pairs: weight of the chosen answers' own cross-entropy (RPO; Pang et al., 2024). `orpo` has
    it by definition."""
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

    @model_validator(mode="after")
    def _check_loss(self) -> PreferenceConfig:
        users = {
            "label_smoothing": ("cdpo", "robust"),
            "simpo_margin": ("simpo",),
            "sft_weight": ("dpo", "cdpo", "robust", "ipo", "simpo"),
            "desirable_weight": ("kto",),
            "undesirable_weight": ("kto",),
            "reference": ("dpo", "cdpo", "robust", "ipo", "kto"),
        }
        for name, losses in users.items():
            if getattr(self, name) and self.loss not in losses:
                raise ValueError(
                    f"{name} has no effect with loss={self.loss}; leave it out, or choose a loss "
                    f"from {', '.join(losses)}"
                )
        return self
