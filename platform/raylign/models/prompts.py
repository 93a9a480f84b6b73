"""Virtual tokens in front of every text: prompt tuning and prefix tuning.

The decoder itself is made to see them, by hooks on its forward pass. So whatever calls it, scoring,
losses on packed rows or generation with a cache, works as without them: tokens go in, hidden states
of those tokens come out. Every document of a packed row sees the virtual tokens; positions count
from after them, as peft has it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from raylign.config import UserError

NAME = "virtual_tokens"
"""What the module is called inside the model."""


class VirtualTokens(nn.Module):
    """`prompt`: embeddings [n, width] (Lester et al., 2021); `prefix`: keys and values of every
    layer, [n, layers * 2 * key heads * head width] (Li and Liang, 2021)."""

    def __init__(self, lm: PreTrainedModel, kind: Literal["prefix", "prompt"], count: int) -> None:
        """Prompts begin as embeddings of tokens drawn at random, prefixes near zero."""
        super().__init__()
        self.kind, self.count, self.enabled = kind, count, True
        self._added = 0
        self.layers, self.heads, self.width = read_shape(lm, kind)
        words = lm.get_input_embeddings().weight.detach()
        size = self.width if kind == "prompt" else 2 * self.layers * self.heads * self.width
        self.embedding = nn.Embedding(count, size, device=words.device)
        with torch.no_grad():
            if kind == "prompt":
                drawn = torch.randint(0, len(words), (count,))
                self.embedding.weight.copy_(words[drawn.to(words.device)])
            else:
                drawn = torch.randn(count, size)
                self.embedding.weight.copy_(
                    drawn.mul_(lm.config.get_text_config().initializer_range)
                )

    def attach(self, lm: PreTrainedModel) -> None:
        """Become part of `lm`, and of all that its decoder does."""
        lm.add_module(NAME, self)
        decoder = lm.get_decoder()
        # Bound methods, so that a deep copy of the model calls the copy of this module.
        decoder.register_forward_pre_hook(self.prepend, with_kwargs=True)
        decoder.register_forward_hook(self.strip, with_kwargs=True)

    def forward(self, rows: int) -> torch.Tensor:
        """[rows, n, size]; through a module's call, so that partitioned weights are gathered."""
        places = torch.arange(self.count, device=self.embedding.weight.device)
        found: torch.Tensor = self.embedding(places)
        return found.expand(rows, -1, -1)

    def prepend(
        self, decoder: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the decoder's forward: the same call with virtual tokens."""
        self._added = 0
        if not self.enabled:
            return None
        assert len(arguments) <= 1, "the decoder is called by keywords"
        given = dict(given)
        if arguments:
            given["input_ids"] = arguments[0]
        tokens: Any = given.get("input_ids")
        inputs: Any = given.get("inputs_embeds")
        rows = (tokens if inputs is None else inputs).shape[0]
        cache = given.get("past_key_values")
        begins = cache is None or cache.get_seq_length() == 0
        given["attention_mask"] = self._widen(given.get("attention_mask"), rows, begins)
        places = given.get("position_ids")
        if self.kind == "prefix":
            if begins:
                given["past_key_values"] = self._fill(cache, rows, decoder)
            if places is not None:
                given["position_ids"] = places + self.count
            return (), given
        if begins:
            if inputs is None:
                inputs = decoder.get_input_embeddings()(tokens)  # type: ignore[operator]
            front = self(rows).to(inputs.dtype)
            self._added = self.count
            given |= {"input_ids": None, "inputs_embeds": torch.cat([front, inputs], dim=1)}
            if places is not None:
                own = torch.arange(self.count, device=places.device).expand(len(places), -1)
                given["position_ids"] = torch.cat([own, places + self.count], dim=1)
        elif places is not None:
            given["position_ids"] = places + self.count
        return (), given

    def strip(
        self, decoder: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any], output: Any
    ) -> Any:
        """After it: hidden states of the text alone."""
        if self._added:
            output.last_hidden_state = output.last_hidden_state[:, self._added :]
        return output

    def _widen(self, mask: torch.Tensor | None, rows: int, begins: bool) -> torch.Tensor | None:
        """A mask over texts as one over virtual tokens and texts."""
        if mask is None:
            return None
        if mask.dim() == 2:
            return torch.cat([mask.new_ones(rows, self.count), mask], dim=1)
        # [B, 1, queries, keys]: everything sees the virtual tokens.
        seen = mask.new_ones(()) if mask.dtype == torch.bool else mask.new_zeros(())
        mask = torch.cat([seen.expand(*mask.shape[:3], self.count), mask], dim=3)
        if self.kind == "prefix" or not begins:
            return mask
        own = torch.ones(self.count, self.count, dtype=torch.bool, device=mask.device).tril()
        wide = nn.functional.pad(own, (0, mask.shape[3] - self.count))
        if mask.dtype != torch.bool:
            wide = torch.zeros(wide.shape, dtype=mask.dtype, device=mask.device).masked_fill(
                ~wide, torch.finfo(mask.dtype).min
            )
        return torch.cat([wide.expand(*mask.shape[:2], -1, -1), mask], dim=2)

    def _fill(self, cache: Any, rows: int, decoder: nn.Module) -> Any:
        """A cache that holds the prefix's keys and values and nothing else."""
        cache = DynamicCache(config=decoder.config) if cache is None else cache
        found = self(rows).to(next(decoder.parameters()).dtype)
        found = found.view(rows, self.count, self.layers * 2, self.heads, self.width)
        pairs = found.permute(2, 0, 3, 1, 4).split(2)  # [2, rows, heads, n, width] a layer
        for layer, (keys, values) in enumerate(pairs):
            cache.update(keys, values, layer)
        return cache


def read_shape(lm: PreTrainedModel, kind: str) -> tuple[int, int, int]:
    """Layers, and how many heads of what width each virtual token has: of a prompt one, as wide as
    the model. Raises `UserError` for heads that peft's form of a prefix cannot hold."""
    config = lm.config.get_text_config()
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    if kind == "prompt":
        return layers, 1, config.hidden_size
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if width * heads != config.hidden_size:
        raise UserError(
            f"peft=prefix: the heads of a {config.model_type} are {width} wide, not hidden_size / "
            "heads, which peft's form of a prefix cannot hold; choose lora or prompt"
        )
    return layers, getattr(config, "num_key_value_heads", None) or heads, width
