from __future__ import annotations

import pytest
import torch

from raylign.algorithms.weighting import Weighting, token_weights, weight_total

MASK = torch.tensor(
    [
        [False, True, True, True, True],
        [False, False, True, False, False],
        [False, False, False, False, False],
        [False, True, False, True, False],  # a hole, as tool output leaves
    ]
)
WEIGHTINGS: list[Weighting] = ["tokens", "sequences", "constant"]


@pytest.mark.parametrize(
    ("weighting", "total", "rows"),
    [
        ("tokens", 7, [1 / 7, 1 / 7, 0, 1 / 7]),
        ("sequences", 3, [1 / 12, 1 / 3, 0, 1 / 6]),
        ("constant", 3, [1 / 30, 1 / 30, 0, 1 / 30]),
    ],
)
def test_by_hand(weighting: Weighting, total: int, rows: list[float]) -> None:
    assert weight_total(MASK, weighting) == total
    expected = MASK * torch.tensor(rows)[:, None]
    torch.testing.assert_close(token_weights(MASK, weighting, max_tokens=10), expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_positive_exactly_under_the_mask(weighting: Weighting) -> None:
    assert torch.equal(token_weights(MASK, weighting, max_tokens=4) > 0, MASK)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_shards_with_the_added_total_are_the_whole(weighting: Weighting) -> None:
    whole = token_weights(MASK, weighting, max_tokens=8)
    shards = [MASK[[0, 2]], MASK[[1, 3]]]
    total = sum(weight_total(shard, weighting) for shard in shards)
    parts = [token_weights(s, weighting, max_tokens=8, total=total) for s in shards]
    torch.testing.assert_close(torch.cat(parts), whole[[0, 2, 1, 3]])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_padding_changes_nothing(weighting: Weighting) -> None:
    wide = torch.zeros(6, 9, dtype=torch.bool)
    wide[:4, :5] = MASK
    weights = token_weights(wide, weighting, max_tokens=8)
    torch.testing.assert_close(weights[:4, :5], token_weights(MASK, weighting, max_tokens=8))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_an_empty_batch_weighs_nothing(weighting: Weighting) -> None:
    assert (token_weights(torch.zeros_like(MASK), weighting, max_tokens=8) == 0).all()


def test_sum_of_weights_is_one_where_the_loss_is_a_mean() -> None:
    for weighting in ("tokens", "sequences"):
        weights = token_weights(MASK, weighting, max_tokens=8)
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
