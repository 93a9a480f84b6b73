"""The model that a stage trains: where it starts, which head it has, what is adapted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import PreTrainedConfig, PreTrainedModel

from raylign.config import AdapterConfig, UserError
from raylign.config.training import PeftKind
from raylign.models.adapters import adapt
from raylign.models.folding import require_foldable
from raylign.models.heads import build_scorer
from raylign.models.loading import DTYPES, add_stops, initialise, load_model
from raylign.models.precision import narrow

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
    base: str | None = None
    """What a saved adapter calls the model it adapts; the directory when not given."""
    dtype: str = "float32"
    """What the engine computes in: for frozen tensors that are not its to cast."""
    stops: tuple[int, ...] = ()
    """Tokens that texts of this stage end with, besides those that the model knows of."""

    def build(self) -> PreTrainedModel:
        """The model on the CPU in float32; of qlora where it is trained, in `dtype`.

        Raises `UserError` for an adapter that does not fit the model.
        """
        if self.peft == "none":
            return self._load("float32")
        if isinstance(self.start, PreTrainedConfig):
            raise UserError(
                f"peft={self.peft}: an adapter needs a model that has learnt something; name its "
                "directory or hub name in model"
            )
        lm = self._load(self.dtype if self.peft == "qlora" else "float32")
        adapt(lm, self.peft, self.adapter, self.seed, self.base or str(self.start))
        if self.peft == "vera":
            # Engines cast parameters; what vera draws and never trains are buffers.
            for name, buffer in lm.named_buffers():
                if "vera_" in name:
                    buffer.data = buffer.data.to(DTYPES[self.dtype])
        return lm

    def _load(self, dtype: str) -> PreTrainedModel:
        if isinstance(self.start, PreTrainedConfig):
            return initialise(self.start, self.seed)
        if self.head == "language":
            lm = load_model(self.start, dtype)
            add_stops(lm.config, self.stops)
        else:
            lm = build_scorer(self.start, self.head, self.seed)
            narrow(lm, DTYPES[dtype])
        require_foldable(lm)
        return lm
