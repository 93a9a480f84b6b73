"""Knobs of shards: which documents are read how often, and how they are laid into rows."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from raylign.config.section import Count, Section

REST = "*"
"""In `weights`: all domains that are not named."""

Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Epochs = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class MixtureConfig(Section):
    """How much of each domain the shards hold, in whole documents."""

    weights: dict[str, Weight] | None = None
    """Domain to its share of the tokens, relative to the others'. Every domain of the corpus must
    be named (0 leaves it out), or `*` weigh the rest, which share by their tokens."""
    alpha: float | None = Field(default=None, ge=0.0, le=1.0)
    """In place of weights: shares proportional to tokens to this power; 1 as found, 0 all equal."""
    min_epochs: Epochs = 0.0
    """Read every domain with a weight at least so often."""
    max_epochs: Epochs = 4.0
    """Read no domain more often; what is left over goes to the others. Beyond four epochs repeated
    text is worth little (Muennighoff et al. 2023)."""
    epochs: dict[str, tuple[Epochs, Epochs]] = Field(default_factory=dict)
    """Domain to bounds of its own in place of `min_epochs` and `max_epochs`."""
    tokens: Count | None = None
    """Training tokens in all; when not given as many as the weighed domains have, or the nearest
    that the bounds on epochs allow."""
    chinchilla_params: Count | None = None
    """In place of `tokens`: parameters of the model to be trained; 20 tokens for each."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weights is not None and self.alpha is not None:
            raise ValueError("give `weights` or `alpha`, not both")
        if self.weights is not None and not any(self.weights.values()):
            raise ValueError("no domain has a weight above 0")
        if self.tokens is not None and self.chinchilla_params is not None:
            raise ValueError("give `tokens` or `chinchilla_params`, not both")
        for name, (least, most) in {
            "": (self.min_epochs, self.max_epochs),
            **self.epochs,
        }.items():
            if least > most:
                place = f"epochs of {name!r}" if name else "min_epochs"
                raise ValueError(f"{place}: {least} is more than the most, {most}")
            if most == 0:
                place = f"epochs of {name!r}" if name else "max_epochs"
                raise ValueError(f"{place}: 0 leaves nothing; give the domain the weight 0")
        return self
