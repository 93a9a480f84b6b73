"""Knobs of a policy update: a row of the catalog, and what replaces its authors' numbers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raylign.config.section import Count, Section


class ImportanceConfig(Section):
    """What is done about tokens that the learner's policy, before its update, gives another
    probability than the rollout worker that sampled them."""

    mode: Literal["truncate", "mask", "none"] = "truncate"
    """truncate caps the ratio, mask leaves out what lies outside the bounds (IcePop), none trusts
    the rollout worker."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """Ratio of each token, or one a sequence: the product of its tokens', or their mean."""
    cap: float = Field(default=2.0, gt=1)
    """Upper bound of the ratio."""
    floor: float = Field(default=0.0, ge=0, lt=1)
    """mask: lower bound of the ratio."""

    @model_validator(mode="after")
    def _check_floor(self) -> ImportanceConfig:
        if self.mode != "mask" and "floor" in self.model_fields_set:
            raise ValueError(f"floor has no effect with mode={self.mode}; leave it out")
        return self


class ValueConfig(Section):
    """The value function of algorithms that have one, and what its advantages are."""

    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount a token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    clip: float | None = Field(default=0.2, gt=0)
    """Farthest that a value is moved from what it was before the update; null does not clip."""
    coef: float = Field(default=0.5, gt=0)
    """Weight of the critic's loss in its own gradient."""


class AlgorithmConfig(Section):
    """A row of the algorithm catalog; a coefficient not given is the one its authors used."""

    name: str = "grpo"
    """Row of `raylign.algorithms.catalog`."""
    clip_low: float | None = Field(default=None, gt=0, le=1)
    """Policy ratio is clipped below at 1 - clip_low."""
    clip_high: float | None = Field(default=None, gt=0)
    """Policy ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound of the ratio for negative advantages, in losses that clip; none when not given."""
    kl_coef: float | None = Field(default=None, ge=0)
    """Weight of KL(policy || reference); 0 needs no reference."""
    kl_in: Literal["loss", "reward"] | None = None
    """Where the KL penalty enters: a term of the loss, or of every token's reward."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Which estimate of the KL; see `raylign.algorithms.kl`."""
    kl_target: float | None = Field(default=None, gt=0)
    """Adapt kl_coef so that the KL per sampled token comes here; fixed when not given."""
    kl_horizon: float = Field(default=10_000.0, gt=0)
    """kl_target: samples over which kl_coef may grow by a fifth."""
    entropy_coef: float | None = Field(default=None, ge=0)
    """Weight of the entropy bonus."""
    beta: float = Field(default=0.1, gt=0)
    """online_dpo: strength of its implicit KL."""
    importance: ImportanceConfig = ImportanceConfig()
    value: ValueConfig = ValueConfig()
    whiten: bool | None = None
    """Bring the advantages of a batch's tokens to mean 0 and variance 1."""
    updates_per_batch: Count = 1
    """Passes over each batch of trajectories."""
    minibatches: Count = 1
    """Optimizer steps a pass; each takes its share of the batch's groups."""
    dynamic_sampling: bool | None = None
    """Groups whose rewards are all the same are replaced by further prompts."""
    sampling_rounds: Count = 3
    """dynamic_sampling: rounds of replacing before a smaller batch is learned from."""
