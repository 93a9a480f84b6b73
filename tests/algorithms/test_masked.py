from __future__ import annotations

import math

import torch

from raylign.algorithms.masked import divide, masked_mean, masked_sum, sequence_sums

VALUES = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
MASK = torch.tensor([[True, False, True], [False, False, True]])


def test_sums_and_mean_by_hand() -> None:
    assert masked_sum(VALUES, MASK) == 37.0
    assert sequence_sums(VALUES, MASK).tolist() == [5.0, 32.0]
    assert masked_mean(VALUES, MASK, 3) == torch.tensor(37.0 / 3)
    assert masked_mean(VALUES, MASK, torch.tensor(37.0)) == 1.0


def test_the_denominator_is_the_callers() -> None:
    parts = [masked_mean(VALUES[i : i + 1], MASK[i : i + 1], 3) for i in range(2)]
    torch.testing.assert_close(sum(parts), masked_mean(VALUES, MASK, 3))


def test_nothing_counted_is_zero_not_nan() -> None:
    empty = torch.zeros_like(MASK)
    assert masked_mean(VALUES, empty, empty.sum()) == 0.0
    assert divide(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])).tolist() == [0.0, 2.0]


def test_what_the_mask_hides_reaches_neither_value_nor_gradient() -> None:
    values = torch.where(MASK, VALUES, math.nan).requires_grad_()
    masked_sum(values, MASK).backward()
    assert values.grad is not None
    assert torch.equal(values.grad, MASK.float())
