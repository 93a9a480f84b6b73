"""Faster forwards for the modules of a transformers Llama; names and weights stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    eager_attention_forward,
)

from raylign.config import UserError
from raylign.models.attention import Piece, attend, find_starts, plan
from raylign.models.kernels import gate, multiply, normalise, rotate


def accelerate(model: PreTrainedModel | nn.Module) -> None:
    """Replace what computes, in place, where a faster way is known.

    The same numbers up to the order of additions, the same `state_dict`; modules of other kinds,
    adapters among them, stay. What a module cannot do its fast way (a cache, a mask that is not
    causal within documents, attention dropout) it does as before.
    """
    for module in model.modules():
        fast = _FAST.get(type(module))
        if fast is not None:
            module.__class__ = fast


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile each layer of the decoder, in place; names stay. Compiled where it is first called.

    Layers are alike, so that one compilation serves them all. Raises `UserError` for a model whose
    decoder does not hold its layers in a list.
    """
    decoder = model.get_decoder()
    layers = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    if not layers:
        raise UserError(
            f"engine.compile: models of type {model.config.model_type} have no list of layers; "
            "set it to false"
        )
    for layer in layers[0]:
        layer.compile(backend=backend)


class FastNorm(LlamaRMSNorm):
    """RMSNorm as one step."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.device.type != "cpu":  # where torch has a kernel of its own for it
            shape = self.weight.shape
            return nn.functional.rms_norm(hidden_states, shape, self.weight, self.variance_epsilon)
        return normalise(hidden_states, self.weight, self.variance_epsilon)


class FastMLP(LlamaMLP):
    """SwiGLU whose middle is one step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.config.hidden_act not in ("silu", "swish"):
            return super().forward(x)
        inner = gate(apply(self.gate_proj, x), apply(self.up_proj, x))
        return apply(self.down_proj, inner)


class FastModel(LlamaModel):
    """The decoder: works out once, for all layers, which tokens see which."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        given = input_ids if input_ids is not None else inputs_embeds
        if given is not None and use_cache is False and self._is_ours(given, attention_mask):
            kwargs["pieces"] = self._cut(given.shape[0], given.shape[1], attention_mask)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _is_ours(self, given: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """Whether attention by blocks is the faster one.

        In float32, without documents to tell apart, torch's own is as good.
        """
        if given.device.type != "cpu" or self.config._attn_implementation != "sdpa":
            return False
        if mask is None:
            return self.norm.weight.dtype != torch.float32
        return mask.dim() == 4 and mask.dtype == torch.bool and mask.shape[1] == 1

    def _cut(self, rows: int, length: int, mask: torch.Tensor | None) -> list[Piece] | None:
        starts = None if mask is None else find_starts(mask)
        if mask is not None and starts is None:
            return None
        heads = self.config.num_attention_heads
        return plan(rows, length, heads, self.norm.weight.dtype, starts)


class FastAttention(LlamaAttention):
    """Rotation as one step each, and attention by blocks."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        pieces: list[Piece] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if past_key_values is not None or position_embeddings is None:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        cosine, sine = position_embeddings
        query = rotate(apply(self.q_proj, hidden_states).view(shape), cosine, sine)
        key = rotate(apply(self.k_proj, hidden_states).view(shape), cosine, sine)
        value = apply(self.v_proj, hidden_states).view(shape).transpose(1, 2)
        dropout = self.attention_dropout if self.training else 0.0
        if pieces is not None and not dropout:
            output = attend(query, key, value, self.scaling, pieces)
            return apply(self.o_proj, output.flatten(2)), None
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            **kwargs,
        )
        return apply(self.o_proj, output.flatten(2)), weights


def apply(linear: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`linear(states)`, past the module where it is a plain one whose weight is all here."""
    if (
        type(linear) is nn.Linear
        and linear.bias is None
        and states.dtype == torch.float32
        and linear.weight.dtype == torch.float32
        and states.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and not hasattr(linear.weight, "ds_id")  # ZeRO-3 gathers weights by the module's hooks
    ):
        return multiply(states, linear.weight)
    return linear(states)


_FAST: dict[type[nn.Module], type[nn.Module]] = {
    LlamaRMSNorm: FastNorm,
    LlamaMLP: FastMLP,
    LlamaModel: FastModel,
    LlamaAttention: FastAttention,
}
