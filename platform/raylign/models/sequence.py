"""Sequence parallelism: ranks share every sequence, and inside attention the heads.

DeepSpeed-Ulysses (Jacobs et al., 2023). All that a decoder does to one token at a time is done by
the rank that holds the token. For attention the ranks exchange pieces, so that each has some of the
heads for the whole sequence, and back. The ranks of a group are given the same rows, and all get
the hidden states of all tokens, so what follows the decoder needs to know nothing of this.

Gradients are those of the *sum of the ranks' losses*: a rank that computes a loss which its peers
compute too counts 1 / ranks of it.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raylign.config import UserError
from raylign.models.prompts import NAME

ULYSSES = "ulysses"
"""Name of the attention among those of transformers."""
SHARING = "shared_positions"
"""Attribute of a model whose ranks share positions."""


def share_sequences(
    lm: PreTrainedModel, group: dist.ProcessGroup, heads: int, kv_heads: int
) -> None:
    """Let the ranks of `group` share what `lm`'s decoder is given; in place, for good.

    heads, kv_heads: of query and key/value on this rank; the first must be a multiple of the ranks.
    Key/value heads that the ranks cannot share out are sent to several. Raises `UserError` for a
    model whose attention is not exchangeable.
    """
    require_exchangeable(lm, getattr(getattr(lm, NAME, None), "kind", "none"))
    AttentionInterface.register(ULYSSES, attend_by_heads)
    decoder = lm.get_decoder()
    ranks = dist.get_world_size(group)
    copies = ranks // math.gcd(kv_heads, ranks)
    inner = decoder.config._attn_implementation
    share = Share(group, copies, inner if inner in ALL_ATTENTION_FUNCTIONS else "sdpa")
    # The model's own configuration stays: it is what gets exported, and sampled from.
    shown = decoder.config
    private = copy.deepcopy(shown)
    private._attn_implementation = ULYSSES
    for module in decoder.modules():
        if getattr(module, "config", None) is shown:
            module.config = private
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups //= copies
            module.sequence_share = share
    object.__setattr__(lm, SHARING, SharedPositions(group))
    cut = _Cut(lm.get_input_embeddings(), group)
    decoder.register_forward_pre_hook(cut.take, with_kwargs=True)
    # Virtual tokens that an adapter puts in front were put there before, and are stripped after.
    decoder.register_forward_hook(cut.join, prepend=True)


def require_exchangeable(lm: PreTrainedModel, peft: str = "none") -> None:
    """Raises `UserError` for a model, or a kind of adapter, whose attention cannot be shared."""
    kind = lm.config.model_type
    grouped = any(hasattr(module, "num_key_value_groups") for module in lm.get_decoder().modules())
    if not lm._supports_attention_backend or not grouped:
        reason = "compute attention in a way of their own"
    elif getattr(lm.config, "sliding_window", None):
        reason = "attend within a sliding window"
    elif peft == "prefix":
        raise UserError("engine.sequence_parallel: peft=prefix works by a cache; set it to 1")
    else:
        return
    raise UserError(
        f"engine.sequence_parallel: models of type {kind} {reason}; set it to 1, or choose a llama"
    )


class Share:
    """How an attention layer shares its work."""

    def __init__(self, group: dist.ProcessGroup, copies: int, inner: str) -> None:
        self.group = group
        self.copies = copies
        """How many ranks get each key/value head."""
        self.inner = inner
        """The attention that computes, of the whole sequence and some heads."""


class Positions:
    """What a rank does of the work on a list of positions: here, all of it."""

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's stretch of a tensor [n, ...]."""
        return tensor

    def sum(self, total: torch.Tensor) -> torch.Tensor:
        """A scalar, added up over the ranks."""
        return total

    def join(self, values: torch.Tensor, count: int) -> torch.Tensor:
        """The values [n] of all positions, from those of this rank's stretch; `count` is n."""
        return values


class SharedPositions(Positions):
    """Ranks that have the same hidden states share the work of the head on them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._ranks, self._place = dist.get_world_size(group), dist.get_rank(group)

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        size = -(-len(tensor) // self._ranks)
        return tensor[self._place * size : (self._place + 1) * size]

    def sum(self, total: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = _Sum.apply(total, self._group)
        return summed

    def join(self, values: torch.Tensor, count: int) -> torch.Tensor:
        size = -(-count // self._ranks)
        padded = nn.functional.pad(values, (0, size - len(values)))
        whole: torch.Tensor = _Gather.apply(padded[None], self._group)
        return whole[0, :count]


def find_positions(lm: PreTrainedModel) -> Positions:
    """How the ranks that hold `lm` share the work on hidden states."""
    found: Positions = getattr(lm, SHARING, _ALONE)
    return found


class _Cut:
    """Gives the decoder this rank's piece of the sequence, and puts the pieces together after."""

    def __init__(self, embedding: nn.Module, group: dist.ProcessGroup) -> None:
        self._embedding, self._group = embedding, group
        self._ranks, self._place = dist.get_world_size(group), dist.get_rank(group)
        self._length = 0

    def take(
        self, decoder: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Inputs of the decoder for a piece; attention sees the whole mask."""
        if args or given.get("past_key_values") is not None or given.get("use_cache"):
            raise ValueError("a shared decoder takes named inputs and no cache")
        tokens, embedded = given.get("input_ids"), given.get("inputs_embeds")
        if embedded is None:
            # Whole, so that noise and other hooks on the embedding see what they expect.
            embedded = self._embedding(tokens)
        self._length = length = embedded.shape[1]
        size = -(-length // self._ranks)
        missing = size * self._ranks - length
        mine = slice(self._place * size, (self._place + 1) * size)
        places = given.get("position_ids")
        if places is None:
            places = torch.arange(length, device=embedded.device)[None]
        # Padding stands right of all that is real: causal attention does not see it.
        embedded = nn.functional.pad(embedded, (0, 0, 0, missing))[:, mine]
        places = nn.functional.pad(places, (0, missing))[:, mine]
        mask = _widen(given.get("attention_mask"), missing)
        replaced = {"inputs_embeds": embedded, "position_ids": places, "attention_mask": mask}
        rest = {name: value for name, value in given.items() if name != "input_ids"}
        return (), rest | replaced

    def join(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The hidden states of all tokens, on every rank."""
        whole = _Gather.apply(output.last_hidden_state, self._group)
        output.last_hidden_state = whole[:, : self._length]
        return output


def _widen(mask: torch.Tensor | None, missing: int) -> torch.Tensor | None:
    """A mask bool [B, 1, T, T] with `missing` more tokens, each of which sees itself."""
    if mask is None:
        return None
    if mask.dim() != 4 or mask.dtype != torch.bool:
        raise ValueError("a shared decoder takes an attention mask bool [B, 1, T, T], or none")
    if not missing:
        return mask
    mask = nn.functional.pad(mask, (0, missing, 0, missing))
    padding = torch.arange(mask.shape[-1] - missing, mask.shape[-1], device=mask.device)
    mask[..., padding, padding] = True
    return mask


def attend_by_heads(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers over a shared sequence.

    query [B, H, T / ranks, D]; key, value [B, G, T / ranks, D]; attention_mask bool [B, 1, T, T];
    the result is [B, T / ranks, H, D]. One exchange there and one back.
    """
    share: Share = module.sequence_share
    ranks = dist.get_world_size(share.group)
    # A head stays with the queries that use it: both are shared out in order.
    key = key.repeat_interleave(share.copies, dim=1)
    value = value.repeat_interleave(share.copies, dim=1)
    parts = [t.unflatten(1, (ranks, -1)) for t in (query, key, value)]
    heads = [part.shape[2] for part in parts]
    sent = torch.cat(parts, dim=2).transpose(0, 1)  # [ranks, B, heads of a rank, T / ranks, D]
    received = _Exchange.apply(sent, share.group).permute(1, 2, 0, 3, 4).flatten(2, 3)
    query, key, value = received.split(heads, dim=1)  # [B, heads of this rank, T, D]
    # Positions are of this rank's piece, and the keys have been rotated already.
    kwargs.pop("position_ids", None)
    attend = ALL_ATTENTION_FUNCTIONS[share.inner]
    output = attend(module, query, key, value, attention_mask, **kwargs)[0]  # [B, T, heads, D]
    back = output.unflatten(1, (ranks, -1)).transpose(0, 1)
    received = _Exchange.apply(back, share.group)  # [ranks, B, T / ranks, heads, D]
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3), None


class _Exchange(torch.autograd.Function):
    """Rank r gets index r of every rank's [ranks, ...], in the order of ranks; so does backward."""

    @staticmethod
    def forward(ctx: Any, sent: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _exchange(sent, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(gradients[0], ctx.group), None


def _exchange(sent: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    sent = sent.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received


class _Sum(torch.autograd.Function):
    """Sum over the ranks, forward and backward."""

    @staticmethod
    def forward(ctx: Any, total: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _sum(total, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum(gradients[0], ctx.group), None


def _sum(total: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = total.clone()
    dist.all_reduce(total, group=group)
    return total


class _Gather(torch.autograd.Function):
    """Pieces [B, T / ranks, ...] to [B, T, ...]; backward sums over the ranks."""

    @staticmethod
    def forward(ctx: Any, piece: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ranks = group, dist.get_world_size(group)
        found = piece.new_empty((ranks * piece.shape[0], *piece.shape[1:]))
        dist.all_gather_single(found, piece.contiguous(), group=group)
        return found.unflatten(0, (ranks, -1)).transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ranks = dist.get_world_size(ctx.group)
        sent = gradients[0].unflatten(1, (ranks, -1)).transpose(0, 1).flatten(0, 1).contiguous()
        found = sent.new_empty((sent.shape[0] // ranks, *sent.shape[1:]))
        dist.reduce_scatter_single(found, sent, group=ctx.group)
        return found, None


_ALONE = Positions()
