"""Next-token cross-entropy as a sum, so that any split of a batch gives the same gradient."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from raylign.models.enclosure import embed_context, over_pieces, project, run_inside


def sum_cross_entropy(
    module: nn.Module,
    tokens: torch.Tensor,
    trained: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    piece: int | None = None,
) -> torch.Tensor:
    """Sum over the trained tokens of -log p(token | tokens before it), in nats; a float32 scalar.

    tokens: int64 [B, T]; trained: bool [B, T], True where token t is a target (column 0 must be
    False: nothing predicts it). attention_mask: bool [B, 1, T, T], True where a query (third axis)
    may attend to a key, or None for plain causal attention. position_ids: int64 [B, T]. The caller
    divides by the trained tokens of the whole step over all ranks and micro-batches. Only trained
    positions are projected onto the vocabulary, `piece` of them at a time (by memory when None).
    """
    return run_inside(module, _sum_loss, tokens, trained, attention_mask, position_ids, piece)


def _sum_loss(
    lm: PreTrainedModel,
    tokens: torch.Tensor,
    trained: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    piece: int | None,
) -> torch.Tensor:
    inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
    hidden = embed_context(lm, tokens, **{k: v for k, v in inputs.items() if v is not None})
    chosen = trained[:, 1:]
    states, targets = hidden[:, :-1][chosen], tokens[:, 1:][chosen]

    def sum_piece(piece_states: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor]:
        logits = project(lm, piece_states)
        return (nn.functional.cross_entropy(logits, wanted, reduction="sum")[None],)

    (sums,) = over_pieces(
        sum_piece, len(targets), lm.config.vocab_size, states, targets, piece=piece
    )
    return sums.sum()
