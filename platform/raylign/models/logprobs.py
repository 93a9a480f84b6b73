"""Log-probability and entropy of every token of a batch, without holding all logits at once."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from raylign.models.crossentropy import score_targets
from raylign.models.enclosure import embed_context, run_inside


def score_tokens(
    module: nn.Module,
    tokens: torch.Tensor,
    lengths: torch.Tensor | None = None,
    temperature: float = 1.0,
    *,
    piece: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of right-padded rows, both float32 [B, T] and differentiable.

    Index t holds log p(token t | tokens before t), and the entropy in nats of the distribution it
    was drawn from, at `temperature`. Column 0, which nothing predicts, and padding (t >= length)
    hold 0. tokens: int64 [B, T]; lengths: int64 [B], all T when None. Attention is causal and
    padding stands right, so no attention mask is needed. `piece` positions are projected onto the
    vocabulary at a time; chosen by memory when None. Raises `ValueError` for temperature <= 0: a
    greedy choice has no density.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive to score tokens, not {temperature}")
    return run_inside(module, _score, tokens, lengths, temperature, piece)


def _score(
    lm: PreTrainedModel,
    tokens: torch.Tensor,
    lengths: torch.Tensor | None,
    temperature: float,
    piece: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = embed_context(lm, tokens)[:, :-1]
    targets = tokens[:, 1:]
    real = torch.ones_like(targets, dtype=torch.bool)
    if lengths is not None:
        real = torch.arange(1, tokens.shape[1], device=tokens.device) < lengths[:, None]

    logprobs, entropy = score_targets(lm, hidden[real], targets[real], temperature, piece=piece)
    return _scatter(logprobs, real), _scatter(entropy, real)


def _scatter(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Values of the True positions of `real` [B, T-1] as [B, T], a zero column in front."""
    rows = torch.zeros(real.shape, dtype=values.dtype, device=values.device)
    rows = rows.masked_scatter(real, values)
    return nn.functional.pad(rows, (1, 0))
