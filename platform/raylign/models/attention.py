"""Causal attention for CPUs, by matrix products over blocks of queries.

The kernel that torch has for CPUs multiplies small tiles by hand-written loops, and reads a dense
mask where documents share a row. Here every product goes to the BLAS in pieces that stay in cache,
a query block is multiplied with no key that all of its queries are forbidden to see, and grouped
queries share their keys without copies of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

BLOCK = 128
"""Queries of a row that are computed together."""
SCORE_BYTES = 2**21
"""Scores computed together, so that they stay in a core's cache."""
KEPT_BYTES = 48 * 2**20
"""Probabilities of a layer that are kept for its backward pass; more are computed again."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries of some rows, and the keys that any of them sees."""

    rows: slice
    queries: slice
    keys: slice
    bias: torch.Tensor
    """[rows or 1, 1, queries, keys from `queries.start - offset` on]: 0 where seen, else -inf."""
    offset: int
    """How many keys from the right end of `keys` on `bias` covers."""


def find_starts(mask: torch.Tensor) -> torch.Tensor | None:
    """Which key each query sees first: int64 [B, T] of a mask bool [B, 1, T, T].

    None unless every query sees exactly the keys from there to itself.
    """
    seen = mask[:, 0]
    length = seen.shape[-1]
    starts = seen.to(torch.uint8).argmax(-1)
    place = torch.arange(length, device=mask.device)
    expected = (place >= starts[..., None]) & (place <= place[:, None])
    return starts if torch.equal(seen, expected) else None


def plan(
    rows: int, length: int, heads: int, dtype: torch.dtype, starts: torch.Tensor | None
) -> list[Piece]:
    """How attention of [rows, heads, length, ...] is cut.

    starts: int64 [rows, length], the first key that each query sees; all zero when None.
    """
    pieces = []
    if starts is not None:
        starts = starts.cpu()
    for first in range(0, length, BLOCK):
        last = min(first + BLOCK, length)
        size = heads * (last - first) * last * dtype.itemsize
        together = max(1, min(rows, SCORE_BYTES // size))
        triangle = _triangle(last - first, dtype)
        for row in range(0, rows, together):
            chosen = slice(row, min(row + together, rows))
            low, bias, covered = 0, triangle, last - first
            if starts is not None:
                wanted = starts[chosen, first:last]
                low = int(wanted.min())
                if int(wanted.max()) > low:
                    bias, covered = _forbid(wanted, low, first, last, dtype), last - low
            pieces.append(Piece(chosen, slice(first, last), slice(low, last), bias, covered))
    return pieces


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    pieces: Sequence[Piece],
) -> torch.Tensor:
    """softmax(scaling * query key^T) value, as `pieces` allow; [B, T, H, D].

    query: [B, H, T, D]; key, value: [B, G, T, D], where G divides H and query head h uses key
    head h * G // H.
    """
    return _Attention.apply(query, key, value, scaling, pieces)


class _Attention(torch.autograd.Function):
    """Gradients as in FlashAttention (Dao et al., 2022, appendix B), over larger blocks."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        pieces: Sequence[Piece],
    ) -> torch.Tensor:
        rows, heads, length, width = query.shape
        query = (query * scaling).contiguous()
        key, value = key.contiguous(), value.contiguous()
        output = query.new_empty(rows, length, heads, width)
        scores = sum(
            (p.rows.stop - p.rows.start)
            * heads
            * (p.queries.stop - p.queries.start)
            * (p.keys.stop - p.keys.start)
            for p in pieces
        )
        keep = scores * query.element_size() <= KEPT_BYTES and any(ctx.needs_input_grad)
        kept = []
        for piece in pieces:
            probabilities = _weigh(query, key, piece)
            result = torch.bmm(probabilities, _cut(value, piece.rows, piece.keys))
            _place(output, piece, result)
            if keep:
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scaling, ctx.pieces = scaling, pieces
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        upstream = gradients[0].transpose(1, 2)  # [B, H, T, D]
        groups = key.shape[1]
        query_gradient = torch.empty_like(query)
        # Several pieces add to the same keys: in float32, and rounded once.
        key_gradient = key.new_zeros(key.shape, dtype=torch.float32)
        value_gradient = key.new_zeros(key.shape, dtype=torch.float32)
        for number, piece in enumerate(ctx.pieces):
            probabilities = kept[number] if kept else _weigh(query, key, piece)
            up = _stack(upstream, piece, groups)
            _add(value_gradient, piece, torch.bmm(probabilities.transpose(1, 2), up))
            down = torch.bmm(up, _cut(value, piece.rows, piece.keys).transpose(1, 2))
            down = torch.ops.aten._softmax_backward_data(down, probabilities, -1, down.dtype)
            _add(key_gradient, piece, torch.bmm(down.transpose(1, 2), _stack(query, piece, groups)))
            result = torch.bmm(down, _cut(key, piece.rows, piece.keys))
            target = query_gradient[piece.rows, :, piece.queries]
            torch.mul(result.view(target.shape), ctx.scaling, out=target)
        return query_gradient, key_gradient.to(key.dtype), value_gradient.to(key.dtype), None, None


def _weigh(query: torch.Tensor, key: torch.Tensor, piece: Piece) -> torch.Tensor:
    """Probabilities [rows * G, H / G * queries, keys] of scaled queries."""
    stacked = _stack(query, piece, key.shape[1])
    scores = torch.bmm(stacked, _cut(key, piece.rows, piece.keys).transpose(1, 2))
    rows, queries = piece.rows.stop - piece.rows.start, piece.queries.stop - piece.queries.start
    by_head = scores.view(rows, -1, queries, scores.shape[-1])
    by_head[..., -piece.offset :] += piece.bias
    return torch.softmax(scores, -1)


def _stack(tensor: torch.Tensor, piece: Piece, groups: int) -> torch.Tensor:
    """[B, H, T, D] at a piece's queries as [rows * G, H / G * queries, D]."""
    cut = tensor[piece.rows, :, piece.queries]
    return cut.reshape(cut.shape[0] * groups, -1, cut.shape[-1])


def _cut(tensor: torch.Tensor, rows: slice, places: slice) -> torch.Tensor:
    """[B, G, T, D] at some rows and places as [rows * G, places, D]."""
    return tensor[rows].flatten(0, 1)[:, places]


def _place(output: torch.Tensor, piece: Piece, result: torch.Tensor) -> None:
    """Write [rows * G, H / G * queries, D] into [B, T, H, D]."""
    target = output[piece.rows, piece.queries].transpose(1, 2)
    target.copy_(result.view(target.shape))


def _add(total: torch.Tensor, piece: Piece, part: torch.Tensor) -> None:
    """Add [rows * G, keys, D] to [B, G, T, D]."""
    target = total[piece.rows, :, piece.keys]
    target += part.view(target.shape)


def _triangle(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((1, 1, size, size), -torch.inf, dtype=dtype).triu(1)


def _forbid(
    starts: torch.Tensor, low: int, first: int, last: int, dtype: torch.dtype
) -> torch.Tensor:
    """0 or -inf, [rows, 1, queries first..last, keys low..last]."""
    keys, queries = torch.arange(low, last), torch.arange(first, last)
    seen = (keys >= starts[..., None]) & (keys <= queries[:, None])
    bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
    return bias[:, None]
