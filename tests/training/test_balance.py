"""Every row is dealt once, budgets hold, ranks agree on the number of micro-batches."""

from __future__ import annotations

import random

import pytest

from raylign.training.balance import plan_micro_batches


@pytest.mark.parametrize("seed", range(20))
def test_plans_are_complete_bounded_and_even(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 50))]
    ranks, budget = rng.randint(1, 4), rng.randint(60, 300)
    plans = plan_micro_batches(lengths, ranks, budget)
    assert sorted(row for plan in plans for group in plan for row in group) == list(
        range(len(lengths))
    )
    assert len({len(plan) for plan in plans}) == 1
    for group in (group for plan in plans for group in plan if group):
        assert len(group) * max(lengths[row] for row in group) <= budget
    loads = [sum(lengths[row] for group in plan for row in group) for plan in plans]
    assert max(loads) - min(loads) <= max(lengths)


def test_a_row_over_the_budget_stands_alone() -> None:
    assert plan_micro_batches([100, 5, 5], 1, 20) == [[[0], [1, 2]]]


def test_more_ranks_than_rows_get_empty_micro_batches() -> None:
    assert plan_micro_batches([3], 3, 10) == [[[0]], [[]], [[]]]
