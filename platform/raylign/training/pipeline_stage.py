"""A model cut into stages: which layers a rank keeps, and how it runs them.

The transformers class stays what it is, and so do the names of its weights. What belongs to another
stage is replaced by modules without weights: one that gives out what was received, and ones that
let it pass. Masks, positions and whatever else a decoder prepares for its layers are therefore
prepared by its own code, on every stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raylign.config import UserError
from raylign.models.division import divide
from raylign.models.enclosure import Enclosure
from raylign.models.prompts import NAME as VIRTUAL_TOKENS
from raylign.training.objectives import embed_batch

# The list of layers, the norm after it, and whether a layer returns a tuple.
_LAYOUTS = (("layers", "norm", False), ("h", "ln_f", True))


class Stage(Enclosure):
    """The part of a model that one rank of a pipeline holds."""

    def __init__(self, lm: PreTrainedModel, stage: int, stages: int) -> None:
        """Takes from `lm`, in place, what other stages hold.

        Raises `UserError` when there are fewer layers than stages or when the decoder has other
        parts than an embedding, layers and a norm.
        """
        super().__init__(lm)
        decoder, layers, norm, as_tuple = _find_parts(lm)
        embedding = decoder.get_input_embeddings()
        costs = [_count(layer) for layer in layers]
        costs[0] += _count(embedding)
        costs[-1] += _count(norm) + sum(_count(part) for part in _rest(lm, decoder))
        self.stage, self.stages = stage, stages
        self.bounds = divide(costs, stages)
        self.tied = _find_tied(lm, decoder, layers, self.bounds)
        self.width: int = lm.config.get_text_config().hidden_size
        self._inlet: _Inlet | None = None
        mine = range(self.bounds[stage], self.bounds[stage + 1])
        like = next(p for p in layers[mine.start].parameters() if p.is_floating_point())
        for index in range(len(layers)):
            if index not in mine:
                layers[index] = _Pass(as_tuple)
        if stage > 0:
            self._inlet = _Inlet(as_tuple)
            layers[mine.start - 1] = self._inlet
            if self.tied and stage == stages - 1:
                blank: _NoEmbedding = _TiedEmbedding(self._inlet, embedding.weight)
            else:
                blank = _UntiedEmbedding(self._inlet, like)
            decoder.set_input_embeddings(blank)
        if stage < stages - 1:
            setattr(decoder, _name_of(decoder, norm), _Outlet(like))
            for name, part in list(lm.named_children()):
                if part is not decoder:
                    setattr(lm, name, nn.Identity())

    def run(self, batch: Any, received: torch.Tensor | None) -> torch.Tensor:
        """Hidden states [B, T, width] after this stage's layers, and on the last one after the
        final norm. `received` is what the stage before made of the same micro-batch; None on the
        first."""
        if self._inlet is None:
            return embed_batch(self.lm, batch)
        self._inlet.received = received
        try:
            return embed_batch(self.lm, batch)
        finally:
            self._inlet.received = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(_PARTIAL)


_PARTIAL = (
    "with engine.pipeline_parallel > 1 a rank holds some of the layers, and cannot call the model; "
    "use Engine.accumulate and Engine.measure"
)


class _Inlet(nn.Module):
    """In the place of the last layer before this stage's first."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self._as_tuple = as_tuple
        self.received: torch.Tensor | None = None
        """What the stage before made, while a micro-batch runs."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> Any:
        received = self.require()
        return (received,) if self._as_tuple else received

    def require(self) -> torch.Tensor:
        """What was received; raises `NotImplementedError` when somebody else calls the model."""
        if self.received is None:
            raise NotImplementedError(_PARTIAL)
        return self.received


class _NoEmbedding(nn.Module):
    """In the place of the embedding: a tensor of the right shape, that the inlet will ignore."""

    def __init__(self, inlet: _Inlet) -> None:
        super().__init__()
        self._inlet = (inlet,)  # in a tuple: not a part of this module

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._inlet[0].require().detach()


class _TiedEmbedding(_NoEmbedding):
    """Keeps the weight that the head is tied to, so that it has one name on all stages."""

    def __init__(self, inlet: _Inlet, weight: nn.Parameter) -> None:
        super().__init__(inlet)
        self.weight = weight


class _UntiedEmbedding(_NoEmbedding):
    """Keeps nothing; `weight` is something of the model's type, for those who look there for it."""

    def __init__(self, inlet: _Inlet, like: torch.Tensor) -> None:
        super().__init__(inlet)
        self._like = (like,)

    @property
    def weight(self) -> torch.Tensor:
        return self._like[0]


class _Pass(nn.Module):
    """In the place of a layer of another stage."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self._as_tuple = as_tuple

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden,) if self._as_tuple else hidden


class _Outlet(nn.Module):
    """In the place of the norm."""

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self._like = (like,)

    @property
    def weight(self) -> torch.Tensor:
        """Something of the model's type, for decoders that look there for it."""
        return self._like[0]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def _find_parts(lm: PreTrainedModel) -> tuple[Any, nn.ModuleList, nn.Module, bool]:
    """Decoder, layers, norm, and whether layers return tuples."""
    if hasattr(lm, VIRTUAL_TOKENS):
        raise UserError(
            "engine.pipeline_parallel: peft=prefix and peft=prompt need the whole model; use lora"
        )
    decoder = lm.get_decoder()
    for layers_name, norm_name, as_tuple in _LAYOUTS:
        layers, norm = getattr(decoder, layers_name, None), getattr(decoder, norm_name, None)
        if isinstance(layers, nn.ModuleList) and isinstance(norm, nn.Module):
            known = _count(layers) + _count(norm) + _count(decoder.get_input_embeddings())
            if known == _count(decoder) and any(part is decoder for part in lm.children()):
                return decoder, layers, norm, as_tuple
    raise UserError(
        f"engine.pipeline_parallel: a {type(lm).__name__} has other parts than an embedding, "
        "layers, a norm and a head, and cannot be cut into stages; use zero_stage 3 instead"
    )


def _find_tied(
    lm: PreTrainedModel, decoder: Any, layers: nn.ModuleList, bounds: tuple[int, ...]
) -> tuple[str, ...]:
    """Names of the weights that both the first and the last stage need."""
    last = len(bounds) - 2
    parts = [(0, decoder.get_input_embeddings()), *((last, part) for part in _rest(lm, decoder))]
    for stage in range(last + 1):
        parts += [(stage, layer) for layer in list(layers)[bounds[stage] : bounds[stage + 1]]]
    holders: dict[int, set[int]] = {}
    for stage, part in parts:
        for parameter in part.parameters():
            holders.setdefault(id(parameter), set()).add(stage)
    shared = [n for n, p in lm.named_parameters() if len(holders.get(id(p), ())) > 1]
    embedding = decoder.get_input_embeddings().weight
    if any(p is not embedding for n, p in lm.named_parameters() if n in shared):
        raise UserError(
            f"engine.pipeline_parallel: layers of several stages of this {type(lm).__name__} share "
            "weights; use zero_stage 3 instead"
        )
    return tuple(shared)


def _rest(lm: PreTrainedModel, decoder: nn.Module) -> Iterator[nn.Module]:
    """What comes after the decoder: the head."""
    return (part for part in lm.children() if part is not decoder)


def _name_of(parent: nn.Module, child: nn.Module) -> str:
    return next(name for name, part in parent.named_children() if part is child)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
