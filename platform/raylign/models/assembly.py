"""The model that a stage trains: where it starts, which head it has, what is adapted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import PreTrainedConfig, PreTrainedModel

from raylign.config import AdapterConfig
from raylign.config.training import PeftKind
from raylign.models.loading import initialise, load_model

Head = Literal["language", "score", "steps"]


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """Small, and the same on every rank: `build` gives every rank the same weights."""

    start: Path | PreTrainedConfig
    """Directory with weights to begin with, or a configuration to initialise."""
    seed: int
    """Of every weight that is not read from a directory."""
    head: Head = "language"
    """Next tokens; one score a text; one a step."""
    peft: PeftKind = "none"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    def build(self) -> PreTrainedModel:
        """The model, in float32 on the CPU."""
        if isinstance(self.start, PreTrainedConfig):
            return initialise(self.start, self.seed)
        return load_model(self.start)
