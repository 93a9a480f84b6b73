from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from raylign.algorithms.advantages import (
    gae,
    group_relative,
    keep_rewards,
    leave_one_out,
)

EPS = 1e-6


def _sample(seed: int) -> tuple[list[float], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 4, (40,), generator=generator).float() / 3
    groups = torch.randint(0, 12, (40,), generator=generator) * 7 - 3  # sparse, interleaved ids
    return rewards.tolist(), groups.tolist()


def _loop(rewards: list[float], groups: list[int], kind: str) -> list[float]:
    result = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        others = [
            r for j, (r, g) in enumerate(zip(rewards, groups, strict=True)) if g == group and j != i
        ]
        if len(set(members)) < 2:
            result.append(0.0)
        elif kind == "leave_one_out":
            result.append(reward - statistics.fmean(others))
        else:
            scale = statistics.stdev(members) + EPS if kind == "scaled" else 1.0
            result.append((reward - statistics.fmean(members)) / scale)
    return result


def _compute(rewards: Tensor, groups: Tensor, kind: str) -> Tensor:
    if kind == "leave_one_out":
        return leave_one_out(rewards, groups)
    return group_relative(rewards, groups, scale_by_std=kind == "scaled", eps=EPS)


KINDS = ["scaled", "unscaled", "leave_one_out"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_as_the_loop_says(kind: str, seed: int) -> None:
    rewards, groups = _sample(seed)
    actual = _compute(torch.tensor(rewards), torch.tensor(groups), kind)
    torch.testing.assert_close(actual, torch.tensor(_loop(rewards, groups, kind)))


def test_group_relative_by_hand() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 3.0, 5.0]), torch.tensor([0, 0, 1, 1])
    plain = group_relative(rewards, groups, scale_by_std=False)
    assert plain.tolist() == [0.5, -0.5, -1.0, 1.0]
    scaled = group_relative(rewards, groups, scale_by_std=True, eps=0.0)
    torch.testing.assert_close(scaled, torch.tensor([1.0, -1.0, -1.0, 1.0]) / math.sqrt(2))
    assert leave_one_out(rewards, groups).tolist() == [1.0, -1.0, -2.0, 2.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1e-30, -1e30])
def test_a_group_without_spread_teaches_exactly_nothing(
    kind: str, reward: float, dtype: torch.dtype
) -> None:
    rewards = torch.tensor([reward] * 7 + [0.3], dtype=dtype)
    groups = torch.tensor([0] * 7 + [1])  # and a group of one
    assert _compute(rewards, groups, kind).tolist() == [0.0] * 8
    unguarded = group_relative(rewards, groups, scale_by_std=True, eps=0.0)
    assert unguarded.tolist() == [0.0] * 8


@pytest.mark.parametrize("kind", KINDS)
def test_finite_at_the_edges_of_float32(kind: str) -> None:
    rewards = torch.tensor([3e38, -3e38, 0.0, 1e-45, 0.0, 1.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    if kind == "scaled":
        assert torch.isfinite(_compute(rewards, groups, kind)).all()
    assert not _compute(rewards[3:], groups[3:], kind).isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_order_and_other_groups_do_not_matter(kind: str) -> None:
    rewards, groups = (torch.tensor(x) for x in _sample(9))
    whole = _compute(rewards, groups, kind)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_compute(rewards[order], groups[order], kind), whole[order])
    one = groups == groups[0]
    torch.testing.assert_close(_compute(rewards[one], groups[one], kind), whole[one])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_that_is_not_finite_is_refused(kind: str, bad: float) -> None:
    with pytest.raises(ValueError, match="1 of 3 rewards are not finite"):
        _compute(torch.tensor([1.0, bad, 0.0]), torch.zeros(3, dtype=torch.int64), kind)


def test_kept_rewards() -> None:
    rewards = torch.tensor([1.0, 0.0, 3.0, 5.0])
    assert keep_rewards(rewards, torch.zeros(4, dtype=torch.int64)) is rewards
    with pytest.raises(ValueError, match="1 of 1 rewards are not finite"):
        keep_rewards(torch.tensor([math.nan]), torch.zeros(1, dtype=torch.int64))


def _gae_by_definition(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> list[float]:
    """Sum over l of (gamma lam)^l delta_(t+l), for one sequence without holes."""
    following = [*values, 0.0][1:]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.5, 1.0)])
def test_gae_by_definition_over_trained_tokens(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(4)
    rewards, values = torch.randn(2, 5, 9, generator=generator)
    mask = torch.rand(5, 9, generator=generator) < 0.6
    mask[4] = False
    hidden = torch.where(mask, 0.0, math.nan)
    advantages, returns = gae(rewards + hidden, values + hidden, mask, gamma, lam)
    for row in range(5):
        at = mask[row]
        expected = _gae_by_definition(
            rewards[row, at].tolist(), values[row, at].tolist(), gamma, lam
        )
        torch.testing.assert_close(advantages[row, at], torch.tensor(expected))
        torch.testing.assert_close(returns[row, at], torch.tensor(expected) + values[row, at])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_gae_without_discount_is_the_reward_to_go_minus_the_value() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.25, 0.5, 0.75]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    torch.testing.assert_close(advantages, torch.tensor([[0.75, 0.5, 0.25]]))
    torch.testing.assert_close(returns, torch.ones(1, 3))
