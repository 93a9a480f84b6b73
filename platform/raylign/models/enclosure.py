"""One forward call around any use of a language model.

What wraps a model (ZeRO's gathering of partitioned weights, its gradient bookkeeping) works by
hooks on one outermost forward. A loss that applies the head in pieces to the decoder's hidden
states would bypass them if it called the parts directly, so it is written as a *body*, a function
of the bare model, and run inside that outermost forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from raylign.config import UserError
from raylign.models.memory import LOGIT_BYTES
from raylign.models.windows import narrow_mask

T = TypeVar("T")

# Keys by which further families change their logits, in ways that `bend` does not know.
_UNKNOWN = ("logits_soft_cap", "output_logit_soft_cap", "lm_head_multiplier", "output_multiplier")


class Enclosure(nn.Module):
    """The outermost module given to a wrapper: calls the model, or a body with the model."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    @property
    def config(self) -> PreTrainedConfig:
        return self.lm.config

    def forward(self, *args: Any, body: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if body is None:
            return self.lm(*args, **kwargs)
        return body(self.lm, *args, **kwargs)


def run_inside(module: nn.Module, body: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """`body(model, *args, **kwargs)` inside the outermost forward of `module`.

    `module` is a causal language model of transformers, or whatever wraps an `Enclosure` of one.
    """
    if isinstance(module, Enclosure) or isinstance(getattr(module, "module", None), Enclosure):
        return module(*args, body=body, **kwargs)
    return body(module, *args, **kwargs)


def embed_context(lm: PreTrainedModel, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Last hidden states [B, T, width] of `tokens` [B, T]; `inputs` go to the decoder.

    An attention_mask is bool [B, 1, T, T]; layers that see a window only get it narrowed to that.
    """
    mask = inputs.get("attention_mask")
    if mask is not None:
        inputs["attention_mask"] = narrow_mask(lm, mask, inputs.get("position_ids"))
    return lm.get_decoder()(input_ids=tokens, use_cache=False, **inputs).last_hidden_state


def project(lm: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Logits float32 [n, vocabulary] of hidden states [n, width].

    A plain head is applied by its weight and not by its module: where weights are gathered for use,
    the number of pieces that a rank cuts its rows into must not become a number of gatherings.
    """
    head = lm.get_output_embeddings()
    if type(head) is nn.Linear:
        return bend(lm.config, nn.functional.linear(states, head.weight, head.bias).float())
    return bend(lm.config, head(states).float())


def is_bent(config: PreTrainedConfig) -> bool:
    """Whether logits are more than the head's product. Raises `UserError` for a family that changes
    them in a way that is not known here."""
    text = config.get_text_config()
    known = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    for name in _UNKNOWN + ("logits_scaling",) * (not text.model_type.startswith("granite")):
        if getattr(text, name, None) not in (None, 1.0):
            raise UserError(
                f"models of type {text.model_type} change their logits ({name} in config.json), in "
                "a way that is not known here; choose another model"
            )
    return any(getattr(text, name, None) not in (None, 1.0) for name in known)


def bend(config: PreTrainedConfig, logits: torch.Tensor) -> torch.Tensor:
    """What some families do to their logits: a factor (Cohere), a divisor (Granite), and a bound,
    cap * tanh(logits / cap) (Gemma 2)."""
    if not is_bent(config):
        return logits
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None)
    logits = logits if scale is None else logits * scale
    divisor = getattr(text, "logits_scaling", None)
    logits = logits if divisor is None else logits / divisor
    cap = getattr(text, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def over_pieces(
    function: Callable[..., tuple[torch.Tensor, ...]],
    positions: int,
    vocab_size: int,
    *tensors: torch.Tensor,
    piece: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """`function` applied to aligned pieces of `tensors` [positions, ...], results concatenated.

    Each piece makes float32 logits [piece, vocab_size] that are dropped after its forward pass and
    computed again in its backward pass, unless one piece is enough.
    """
    piece = piece or max(1, LOGIT_BYTES // (4 * vocab_size))
    if positions <= piece:
        return function(*tensors)
    parts = [
        checkpoint(function, *cut, use_reentrant=False, preserve_rng_state=False)
        for cut in zip(*(t.split(piece) for t in tensors), strict=True)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))
