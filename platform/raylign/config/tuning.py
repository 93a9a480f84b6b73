"""Knobs of `tune` and `merge`: what is searched over a training stage, and adapters put to use."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from raylign.config.section import Count, Section

Value = bool | int | float | str


class RangeConfig(Section):
    """Numbers between two bounds."""

    low: float
    """Smallest."""
    high: float
    """Largest."""
    log: bool = False
    """Even on a logarithmic scale."""
    integer: bool = False
    """Whole numbers only."""


class TuneConfig(Section):
    """`python -m jobs.tune`: many short runs of one training stage, the best one kept."""

    stage: Literal["pretrain", "sft", "reward_model", "preference", "align"] = "sft"
    """What is trained; its own section of the recipe is what every trial starts from."""
    space: dict[str, tuple[Value | tuple[Value, ...], ...] | RangeConfig] = Field(default={})
    """Key below the stage's section (as `adapter.rank`) to the values, or the range, to try."""
    trials: Count = 8
    """Trials in all; with lists only, 0 < trials <= the size of the grid takes them in order."""
    search: Literal["grid", "random"] = "random"
    """Every combination of lists, or draws."""
    scheduler: Literal["none", "asha", "pbt"] = "asha"
    """asha stops bad trials early (Li et al., 2020); pbt copies good ones (Jaderberg et al., 2017).
    """
    grace_steps: Count = 20
    """asha, pbt: steps before a trial may be stopped or copied."""
    reduction: int = Field(default=3, ge=2)
    """asha: one in this many goes on."""
    metric: str = "validation_loss"
    """What is compared, a column of the trials' metrics."""
    goal: Literal["min", "max"] = "min"
    """Which end of it is good."""
    concurrent: Count = 2
    """Trials at once."""
    cpus: float = Field(default=1.0, gt=0)
    """Ray CPUs a trial's rank; fractions let trials share a core."""
    gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs a trial's rank; fractions let trials share a card."""

    @model_validator(mode="after")
    def _check_stage(self) -> TuneConfig:
        if self.stage == "align" and self.scheduler == "pbt":
            raise ValueError("scheduler=pbt copies checkpoints, which align cannot adopt; use asha")
        if self.stage == "align":
            if self.metric.startswith("validation_"):
                raise ValueError(
                    f"align measures no {self.metric}; give another metric, such as reward/total"
                )
            if "goal" not in self.model_fields_set:
                raise ValueError(f"say which goal is good of {self.metric}: min or max")
        return self


class MergeConfig(Section):
    """`python -m jobs.merge`: an adapter folded into the weights it was trained on."""

    adapter: Path | None = None
    """Directory in PEFT form; the run's own newest trained stage when not given."""
    model: str | None = None
    """The base; the one that the adapter names when not given."""
    output_dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the merged weights; the base's when not given."""
