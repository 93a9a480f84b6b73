"""Credit against loops over the whole batch, and the same however rows are dealt to ranks."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from raylign.algorithms.advantages import gae
from raylign.algorithms.catalog import ALGORITHMS, Algorithm
from raylign.algorithms.credit import (
    apply_whitening,
    assign_credit,
    penalise_tokens,
    place_rewards,
    sum_ahead,
    whiten_moments,
)
from raylign.algorithms.masked import sequence_sums


@dataclass(frozen=True)
class Rollouts:
    rewards: Tensor
    groups: Tensor
    mask: Tensor
    old: Tensor
    reference: Tensor
    values: Tensor


def make_rollouts(seed: int = 0, rows: int = 12, width: int = 9) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    old, reference, values = torch.randn(3, rows, width, generator=generator).double()
    mask = torch.rand(rows, width, generator=generator) < 0.7
    mask[:, 0] = False
    mask[3] = False
    rewards = torch.randint(0, 3, (rows,), generator=generator).double()
    groups = torch.randint(0, 3, (rows,), generator=generator) * 5
    return Rollouts(rewards, groups, mask, old, reference, values)


def credit(
    row: Algorithm, world: Rollouts, deal: list[list[int]], width: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """The whole step, as ranks with the rows of `deal` do it; [B, T] in the batch's order."""
    numbers = row.coefficients
    kl_sums = torch.zeros_like(world.rewards)
    for rows in deal:
        mask = world.mask[rows][:, :width]
        kl = penalise_tokens(
            world.old[rows][:, :width], world.reference[rows][:, :width], mask, numbers
        )
        kl_sums[rows] = sequence_sums(kl, mask)
    advantages, returns = torch.zeros_like(world.old), torch.zeros_like(world.old)
    moments = torch.zeros(3, dtype=torch.float64)
    for rows in deal:
        mask, reference = world.mask[rows], world.reference[rows]
        found, expected = assign_credit(
            row,
            numbers,
            world.rewards,
            world.groups,
            mask,
            torch.tensor(rows),
            kl=penalise_tokens(world.old[rows], reference, mask, numbers),
            values=world.values[rows],
            kl_sums=kl_sums,
        )
        advantages[rows] = found
        moments += whiten_moments(found, mask)
        if expected is not None:
            returns[rows] = expected
    if numbers.whiten:
        for rows in deal:
            advantages[rows] = apply_whitening(advantages[rows], world.mask[rows], moments)
    return advantages, returns if row.needs_values else None


EVERY = [list(range(12))]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_dealing_does_not_matter(name: str) -> None:
    world, row = make_rollouts(), ALGORITHMS[name]
    whole, returns = credit(row, world, EVERY)
    for deal in (
        [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]],
        [[11, 2], [3], [0, 1, 4, 5, 6, 7, 8, 9, 10]],
    ):
        advantages, expected = credit(row, world, deal)
        torch.testing.assert_close(advantages, whole)
        if returns is not None:
            torch.testing.assert_close(expected, returns)
    assert (whole[~world.mask] == 0).all() and whole.abs().sum() > 0


def reference_kl(world: Rollouts, row: int, t: int) -> float:
    return float(world.old[row, t] - world.reference[row, t])


def whitened(values: list[list[float]]) -> list[list[float]]:
    every = [x for row in values for x in row]
    mean, deviation = statistics.fmean(every), statistics.stdev(every)
    return [[(x - mean) / (deviation + 1e-6) for x in row] for row in values]


@pytest.mark.parametrize("seed", range(3))
def test_reinforce_pp_as_the_loop_says(seed: int) -> None:
    """A_t = r - coef * (KL of t and later), then normalised over all tokens of the batch."""
    world, row = make_rollouts(seed), ALGORITHMS["reinforce_pp"]
    coef, values = row.coefficients.kl_coef, []
    for b in range(12):
        places = world.mask[b].nonzero()[:, 0].tolist()
        values.append(
            [
                float(world.rewards[b])
                - coef * sum(reference_kl(world, b, later) for later in places if later >= t)
                for t in places
            ]
        )
    advantages, returns = credit(row, world, EVERY)
    assert returns is None
    for b, expected in enumerate(whitened(values)):
        assert advantages[b][world.mask[b]].tolist() == pytest.approx(expected)


def test_reinforce_pp_with_a_baseline_as_the_loop_says() -> None:
    world, row = make_rollouts(5), ALGORITHMS["reinforce_pp_baseline"]
    values = []
    for b in range(12):
        siblings = world.rewards[world.groups == world.groups[b]].tolist()
        gain = float(world.rewards[b]) - statistics.fmean(siblings)
        values.append([gain] * int(world.mask[b].sum()))
    advantages, _ = credit(row, world, EVERY)
    for b, expected in enumerate(whitened(values)):
        assert advantages[b][world.mask[b]].tolist() == pytest.approx(expected)


def test_rloo_takes_the_whole_divergence_off_the_reward_before_it_compares() -> None:
    world, row = make_rollouts(6), ALGORITHMS["rloo"]
    coef = row.coefficients.kl_coef
    totals = [
        float(world.rewards[b])
        - coef * sum(reference_kl(world, b, t) for t in world.mask[b].nonzero()[:, 0].tolist())
        for b in range(12)
    ]
    advantages, _ = credit(row, world, EVERY)
    for b in range(12):
        others = [totals[o] for o in range(12) if o != b and world.groups[o] == world.groups[b]]
        expected = totals[b] - statistics.fmean(others) if others else 0.0
        assert advantages[b][world.mask[b]].tolist() == pytest.approx(
            [expected] * int(world.mask[b].sum())
        )


def test_ppo_is_gae_of_penalised_rewards() -> None:
    """InstructGPT: -coef * KL at every token, and the reward on the last."""
    world, row = make_rollouts(7), ALGORITHMS["ppo"]
    row = replace(row, coefficients=replace(row.coefficients, whiten=False, gamma=0.9))
    earned = torch.zeros_like(world.old)
    for b in range(12):
        places = world.mask[b].nonzero()[:, 0].tolist()
        for t in places:
            earned[b, t] = -row.coefficients.kl_coef * reference_kl(world, b, t)
        if places:
            earned[b, places[-1]] += world.rewards[b]
    expected = gae(earned, world.values, world.mask, 0.9, row.coefficients.lam)
    found = credit(row, world, EVERY)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    white, _ = credit(ALGORITHMS["ppo"], world, EVERY)
    chosen = white[world.mask].tolist()
    assert statistics.fmean(chosen) == pytest.approx(0, abs=1e-9)
    assert statistics.variance(chosen) == pytest.approx(1, rel=1e-4)


def test_a_divergence_in_the_loss_is_left_alone() -> None:
    world = make_rollouts(8)
    for name in ("ppo", "reinforce_pp", "rloo"):
        row = ALGORITHMS[name]
        in_loss = replace(row, coefficients=replace(row.coefficients, kl_in="loss"))
        free = replace(row, coefficients=replace(row.coefficients, kl_coef=0.0))
        left, right = (credit(x, world, EVERY)[0] for x in (in_loss, free))
        torch.testing.assert_close(left, right)
        assert not torch.equal(left, credit(row, world, EVERY)[0])


@pytest.mark.parametrize(
    ("name", "missing"),
    [("ppo", "values"), ("ppo", "kl"), ("reinforce_pp", "kl"), ("rloo", "kl_sums")],
)
def test_what_is_missing_is_named(name: str, missing: str) -> None:
    world, row = make_rollouts(), ALGORITHMS[name]
    given = {"kl": world.old, "values": world.values, "kl_sums": world.rewards} | {missing: None}
    with pytest.raises(ValueError, match=missing):
        assign_credit(
            row,
            row.coefficients,
            world.rewards,
            world.groups,
            world.mask,
            torch.arange(12),
            **given,  # type: ignore[arg-type]
        )


def test_a_reward_that_is_not_finite_is_refused_with_a_critic_too() -> None:
    world, row = make_rollouts(), ALGORITHMS["ppo"]
    broken = replace(world, rewards=torch.where(world.groups == 5, math.nan, world.rewards))
    with pytest.raises(ValueError, match="rewards are not finite"):
        credit(row, broken, EVERY)


def test_places() -> None:
    mask = torch.tensor([[False, True, True, False], [False] * 4, [True] * 4])
    assert place_rewards(torch.tensor([5.0, 6.0, 7.0]), mask).tolist() == [
        [0, 0, 5, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 7],
    ]
    values = torch.tensor([[math.nan, 1.0, 2.0, math.nan], [math.nan] * 4, [1.0, 2.0, 3.0, 4.0]])
    assert sum_ahead(values, mask).tolist() == [[3, 3, 2, 0], [0] * 4, [10, 9, 7, 4]]


def test_whitening_over_ranks() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(20, 6, generator=generator) * 1e-3 + 50
    mask = torch.rand(20, 6, generator=generator) < 0.5
    hidden = torch.where(mask, values, math.nan)
    moments = sum(
        (whiten_moments(hidden[s], mask[s]) for s in (slice(0, 3), slice(3, 20), slice(20, 20))),
        torch.zeros(3, dtype=torch.float64),
    )
    chosen = values[mask].tolist()
    white = apply_whitening(hidden, mask, moments)
    mean, deviation = statistics.fmean(chosen), statistics.stdev(chosen)
    expected = [(x - mean) / (deviation + 1e-6) for x in chosen]
    assert white[mask].tolist() == pytest.approx(expected, abs=1e-4)
    assert (white[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1.1, -1e5 / 7, 0.0])
def test_whitening_of_what_does_not_vary_is_nothing(value: float, dtype: torch.dtype) -> None:
    """Exactly, though the sums round."""
    values, mask = torch.full((50, 7), value, dtype=dtype), torch.ones(50, 7, dtype=torch.bool)
    assert (apply_whitening(values, mask, whiten_moments(values, mask)) == 0).all()
    for few in (torch.zeros_like(mask), mask & (torch.arange(350).view(50, 7) == 3)):
        assert (apply_whitening(values, few, whiten_moments(values, few)) == 0).all()
