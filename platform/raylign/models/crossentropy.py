"""Log-probabilities of targets from hidden states, a piece of the logits at a time.

A vocabulary of 128k makes float32 logits the largest tensor of a step, by far. Here they exist for
one piece of the positions at once, and their gradient overwrites them. A sum of costs whose parts
weigh the same needs them once: its gradients are computed in the forward pass, as Liger (Hsu et
al., 2024) does. Where every position will have a weight of its own they are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from raylign.models.enclosure import is_bent, over_pieces, project
from raylign.models.memory import LOGIT_BYTES
from raylign.models.sequence import find_positions


def sum_costs(
    lm: PreTrainedModel, states: torch.Tensor, targets: torch.Tensor, *, piece: int | None = None
) -> torch.Tensor:
    """Sum of -log p(target), in nats: a float32 scalar.

    states: [n, width], after the decoder's last norm; targets: int64 [n]. `piece` positions are
    projected onto the vocabulary at a time; chosen by memory when None. Ranks that share sequences
    share the positions too.
    """
    share = find_positions(lm)
    return share.sum(_sum_costs(lm, share.cut(states), share.cut(targets), piece))


def _sum_costs(
    lm: PreTrainedModel, states: torch.Tensor, targets: torch.Tensor, piece: int | None
) -> torch.Tensor:
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear or is_bent(lm.config):
        return -_score_targets(lm, states, targets, 1.0, False, piece)[0].sum()
    piece = piece or choose_piece(head.out_features)
    learning = torch.is_grad_enabled()
    return _SumOfCosts.apply(states, head.weight, head.bias, targets, piece, learning)


def score_targets(
    lm: PreTrainedModel,
    states: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    *,
    entropies: bool = True,
    piece: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target) and the entropy in nats at every position, both float32 [n], differentiable.

    states: [n, width]; targets: int64 [n]. Without `entropies` the second is empty. Ranks that
    share sequences share the positions too.
    """
    share, count = find_positions(lm), len(targets)
    states, targets = share.cut(states), share.cut(targets)
    scores, found = _score_targets(lm, states, targets, temperature, entropies, piece)
    return share.join(scores, count), share.join(found, count) if entropies else found


def _score_targets(
    lm: PreTrainedModel,
    states: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    entropies: bool,
    piece: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    head = lm.get_output_embeddings()
    if type(head) is nn.Linear and not is_bent(lm.config):
        piece = piece or choose_piece(head.out_features)
        learning = torch.is_grad_enabled()
        return _Scores.apply(
            states, head.weight, head.bias, targets, temperature, entropies, piece, learning
        )

    # A head with an adapter, or a share of one: by its module. Bent logits: by autograd.
    def score(some: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = torch.log_softmax(project(lm, some) / temperature, dim=-1)
        chosen = logprobs.gather(1, wanted[:, None])[:, 0]
        if not entropies:
            return chosen, chosen.new_empty(0)
        return chosen, -(logprobs.exp() * logprobs).sum(-1)

    logprobs, entropy = over_pieces(
        score, len(targets), lm.config.vocab_size, states, targets, piece=piece
    )
    return logprobs, entropy


def choose_piece(vocab_size: int) -> int:
    """Positions whose float32 logits fill `LOGIT_BYTES`."""
    return max(1, LOGIT_BYTES // (4 * vocab_size))


class _SumOfCosts(torch.autograd.Function):
    """Cross-entropy as a sum, with its gradients ready before they are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        piece: int,
        learning: bool,
    ) -> torch.Tensor:
        learning = learning and any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        wanted = ctx.needs_input_grad if learning else (False, False, False)
        slopes = _Slopes(states, weight, bias, wanted)
        for part in _cut(len(targets), piece):
            logits = _project(states[part], weight, bias)
            chosen = targets[part, None]
            top, right = logits.amax(-1, keepdim=True), logits.gather(1, chosen)
            share = logits.sub_(top).exp_()
            mass = share.sum(-1, keepdim=True)
            total += (mass.log() + top - right).sum()
            if learning:
                share.div_(mass).scatter_add_(1, chosen, -torch.ones_like(mass))
                slopes.add(part, share)
        ctx.slopes = slopes.finish()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale, slopes = gradients[0], ctx.slopes
        ctx.slopes = ()
        return (*(None if s is None else s.mul_(scale) for s in slopes), None, None, None)


class _Scores(torch.autograd.Function):
    """Log-probabilities and entropies; logits are computed again unless one piece held them all."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        entropies: bool,
        piece: int,
        learning: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        scales = torch.empty(len(targets), dtype=torch.float32, device=states.device)
        scores = torch.empty_like(scales)
        entropy = torch.empty_like(scales if entropies else scales[:0])
        logits = scales.new_empty(0)
        for part in _cut(len(targets), piece):
            logits = _project(states[part], weight, bias)
            if temperature != 1.0:
                logits /= temperature
            scale = logits.logsumexp(-1)
            scales[part] = scale
            scores[part] = logits.gather(1, targets[part, None])[:, 0] - scale
            if entropies:
                share = (logits - scale[:, None]).exp_()
                entropy[part] = scale - share.mul_(logits).sum(-1)
        single = learning and len(targets) <= piece
        kept = (logits,) if single else ()
        ctx.save_for_backward(states, weight, bias, targets, scales, entropy, *kept)
        ctx.temperature, ctx.piece = temperature, piece
        return scores, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        states, weight, bias, targets, scales, entropy, *kept = ctx.saved_tensors
        by_score, by_entropy = gradients
        slopes = _Slopes(states, weight, bias, ctx.needs_input_grad)
        for part in _cut(len(targets), ctx.piece):
            if kept:
                logprobs = kept[0] - scales[part, None]
            else:
                logprobs = _project(states[part], weight, bias)
                if ctx.temperature != 1.0:
                    logprobs /= ctx.temperature
                logprobs.sub_(scales[part, None])
            share = logprobs.exp()
            slope = logprobs  # d/dz of the entropy is -p (log p + entropy), of log p(y) it is 1 - p
            if by_entropy is not None and len(by_entropy):
                slope.add_(entropy[part, None]).mul_(share).mul_(-by_entropy[part, None])
            else:
                slope.zero_()
            if by_score is not None:
                slope.addcmul_(share, by_score[part, None], value=-1)
                slope.scatter_add_(1, targets[part, None], by_score[part, None])
            slopes.add(part, slope.div_(ctx.temperature))
        return (*slopes.finish(), None, None, None, None, None)


class _Slopes:
    """Gradients of hidden states, head and its bias, added up over pieces in float32."""

    def __init__(
        self,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        wanted: tuple[bool, ...],
    ) -> None:
        self._inputs, self._weight = states, weight
        self._states = torch.empty_like(states) if wanted[0] else None
        self._head = weight.new_zeros(weight.shape, dtype=torch.float32) if wanted[1] else None
        with_bias = bias is not None and wanted[2]
        self._bias = weight.new_zeros(len(weight), dtype=torch.float32) if with_bias else None

    def add(self, part: slice, slope: torch.Tensor) -> None:
        """slope: float32 [positions, vocabulary], d/d logits."""
        narrow = slope.to(self._weight.dtype)
        if self._states is not None:
            self._states[part] = narrow @ self._weight
        if self._head is not None and narrow.dtype == torch.float32:
            self._head.addmm_(narrow.t(), self._inputs[part])
        elif self._head is not None:
            self._head += narrow.t() @ self._inputs[part]
        if self._bias is not None:
            self._bias += slope.sum(0)

    def finish(self) -> tuple[torch.Tensor | None, ...]:
        dtype = self._weight.dtype
        head, bias = self._head, self._bias
        return (
            self._states,
            None if head is None else head.to(dtype),
            None if bias is None else bias.to(dtype),
        )


def _project(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return nn.functional.linear(states, weight, bias).float()


def _cut(positions: int, piece: int) -> Iterator[slice]:
    for start in range(0, positions, piece):
        yield slice(start, min(start + piece, positions))
