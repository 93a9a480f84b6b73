"""How much each trained token counts: normalisation decided once, before anything is split.

Every loss is `sum(weights * value)`. The weights of the whole batch are computed first and then
travel with their rows, so any split into micro-batches and ranks sums to the same gradient. A
weight is a *share* of the token, over a *total* that is counted over the whole batch:

| weighting   | share of a token     | total     | loss                                            |
|-------------|----------------------|-----------|-------------------------------------------------|
| `tokens`    | 1                    | tokens    | mean over tokens: long sequences count for more |
| `sequences` | 1 / own tokens       | sequences | mean over sequences of their token means        |
| `constant`  | 1 / `max_tokens`     | sequences | mean over sequences of their sums, scaled       |

Only sequences with at least one trained token are counted.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from raylign.algorithms.masked import divide

Weighting = Literal["tokens", "sequences", "constant"]


def weight_total(mask: Tensor, weighting: Weighting) -> Tensor:
    """The total (0-d float32) for `mask` bool [B, T]; totals of shards add up to the batch's."""
    counted = mask if weighting == "tokens" else mask.any(dim=1)
    return counted.sum().float()


def token_weights(
    mask: Tensor, weighting: Weighting, *, max_tokens: int, total: Tensor | float | None = None
) -> Tensor:
    """float32 [B, T]: the weight of each token; positive under `mask` (bool [B, T]), 0 elsewhere.

    `max_tokens` is the longest completion that sampling allows; only `constant` uses it. `total` is
    `weight_total` of the whole batch, for a caller who holds a shard of it; when not given, `mask`
    is the whole batch.
    """
    if total is None:
        total = weight_total(mask, weighting)
    shares = mask.float()
    if weighting == "sequences":
        shares = divide(shares, shares.sum(dim=1, keepdim=True))
    elif weighting == "constant":
        shares = shares / max_tokens
    return divide(shares, torch.as_tensor(total))
