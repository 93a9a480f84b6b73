"""Preference losses: by hand, at their limits, and row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from raylign.algorithms.preference import (
    LOSSES,
    Answers,
    Numbers,
    chosen_cross_entropy,
    compare_labelled,
    compare_rewards,
    conservative_dpo,
    dpo,
    find_loss,
    ipo,
    kto,
    kto_kl,
    log1mexp,
    orpo,
    robust_dpo,
    simpo,
)

PAIR_LOSSES = {name: row for name, row in LOSSES.items() if row.pair_loss is not None}


def answers(sums: list[float], lengths: list[int], reference: list[float] | None = None) -> Answers:
    return Answers(
        torch.tensor(sums, requires_grad=True),
        torch.tensor(lengths),
        None if reference is None else torch.tensor(reference),
    )


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


CHOSEN = answers([-4.0, -9.0], [2, 3], [-6.0, -8.0])  # log-ratios 2 and -1
REJECTED = answers([-5.0, -6.0], [5, 2], [-4.0, -8.0])  # log-ratios -1 and 2


def test_dpo_by_hand() -> None:
    found = dpo(CHOSEN, REJECTED, Numbers(beta=0.5))
    expected = [-math.log(sigma(1.5)), -math.log(sigma(-1.5))]
    assert found.losses.tolist() == pytest.approx(expected)
    assert found.chosen_rewards.tolist() == [1.0, -0.5]
    assert found.rejected_rewards.tolist() == [-0.5, 1.0]
    statistics = compare_rewards(found.chosen_rewards, found.rejected_rewards)
    means = {name: float(total / count) for name, (total, count) in statistics.items()}
    assert means == {
        "rewards/chosen": 0.25,
        "rewards/rejected": 0.25,
        "rewards/margin": 0.0,
        "rewards/accuracy": 0.5,
    }


def test_the_gradient_of_dpo_weighs_pairs_by_how_wrong_they_are() -> None:
    """Rafailov et al., section 4: -beta * sigma(rejected reward - chosen reward)."""
    chosen, rejected = answers([-4.0], [2], [-6.0]), answers([-5.0], [5], [-4.0])
    dpo(chosen, rejected, Numbers(beta=0.5)).losses.sum().backward()
    assert float(chosen.logprobs.grad) == pytest.approx(-0.5 * sigma(-1.5))
    assert float(rejected.logprobs.grad) == pytest.approx(0.5 * sigma(-1.5))


def test_smoothed_losses_by_hand() -> None:
    numbers = Numbers(beta=0.5, label_smoothing=0.2)
    right, wrong = -math.log(sigma(1.5)), -math.log(sigma(-1.5))
    expected = [0.8 * right + 0.2 * wrong, 0.8 * wrong + 0.2 * right]
    assert conservative_dpo(CHOSEN, REJECTED, numbers).losses.tolist() == pytest.approx(expected)
    expected = [(0.8 * right - 0.2 * wrong) / 0.6, (0.8 * wrong - 0.2 * right) / 0.6]
    assert robust_dpo(CHOSEN, REJECTED, numbers).losses.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [conservative_dpo, robust_dpo])
def test_without_smoothing_both_are_dpo(loss: Any) -> None:
    numbers = Numbers(beta=0.3, label_smoothing=0.0)
    assert torch.equal(
        loss(CHOSEN, REJECTED, numbers).losses, dpo(CHOSEN, REJECTED, numbers).losses
    )


def test_robust_dpo_is_unbiased_under_flipped_labels() -> None:
    numbers = Numbers(beta=0.5, label_smoothing=0.2)
    as_given = robust_dpo(CHOSEN, REJECTED, numbers).losses
    flipped = robust_dpo(REJECTED, CHOSEN, numbers).losses
    clean = dpo(CHOSEN, REJECTED, numbers).losses
    assert torch.allclose(0.8 * as_given + 0.2 * flipped, clean, atol=1e-6)


def test_conservative_dpo_rests_at_a_finite_margin() -> None:
    """Its minimum is where sigma(margin) is the share of right labels."""
    rest = math.log(0.8 / 0.2) / 0.5
    chosen, rejected = answers([rest], [1], [0.0]), answers([0.0], [1], [0.0])
    numbers = Numbers(beta=0.5, label_smoothing=0.2)
    conservative_dpo(chosen, rejected, numbers).losses.sum().backward()
    assert float(chosen.logprobs.grad) == pytest.approx(0.0, abs=1e-6)


def test_ipo_and_simpo_by_hand() -> None:
    found = ipo(CHOSEN, REJECTED, Numbers(beta=0.25))
    assert found.losses.tolist() == pytest.approx([(1 + 0.2 - 2) ** 2, (-1 / 3 - 1 - 2) ** 2])
    found = simpo(CHOSEN, REJECTED, Numbers(beta=2.0, margin=0.5))
    expected = [-math.log(sigma(2 * (-2 + 1) - 0.5)), -math.log(sigma(2 * (-3 + 3) - 0.5))]
    assert found.losses.tolist() == pytest.approx(expected)
    assert found.chosen_rewards.tolist() == [-4.0, -6.0]


def test_orpo_by_hand() -> None:
    found = orpo(CHOSEN, REJECTED, Numbers(beta=0.1))
    odds = [math.exp(x) / (1 - math.exp(x)) for x in (-2.0, -3.0, -1.0, -3.0)]
    expected = [-0.1 * math.log(sigma(math.log(odds[i] / odds[i + 2]))) for i in (0, 1)]
    assert found.losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert chosen_cross_entropy(CHOSEN).item() == 13.0


def test_orpo_survives_an_answer_that_is_certain() -> None:
    chosen, rejected = answers([0.0], [2]), answers([-1e4], [1])
    orpo(chosen, rejected, Numbers()).losses.sum().backward()
    assert math.isfinite(float(chosen.logprobs.grad))
    assert math.isfinite(float(rejected.logprobs.grad))


def test_log1mexp_is_exact_at_both_ends() -> None:
    x = torch.tensor([-1e-6, -0.5, -0.7, -5.0, -80.0], requires_grad=True)
    expected = [math.log(-math.expm1(value)) for value in x.tolist()]
    assert log1mexp(x).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-30)
    log1mexp(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_kto_by_hand() -> None:
    numbers = Numbers(beta=0.5, desirable_weight=1.0, undesirable_weight=1.5)
    kl = kto_kl(torch.tensor(3.0), 2)
    assert float(kl) == 1.5
    losses, rewards = kto(CHOSEN, torch.tensor([True, False]), kl, numbers)
    expected = [1 - sigma(0.5 * (2 - 1.5)), 1.5 * (1 - sigma(0.5 * (1.5 + 1)))]
    assert losses.tolist() == pytest.approx(expected)
    assert rewards.tolist() == [1.0, -0.5]
    found = compare_labelled(rewards, torch.tensor([True, False]))
    assert [float(t / c) for t, c in found.values()] == [1.0, -0.5, 1.0]


def test_kto_has_a_reference_point_of_at_least_zero() -> None:
    assert float(kto_kl(torch.tensor(-3.0), 2)) == 0.0
    assert float(kto_kl(torch.tensor(0.0), 0)) == 0.0


def test_ties_count_half() -> None:
    rewards = torch.tensor([1.0, 2.0, 0.0])
    total, count = compare_rewards(rewards, torch.tensor([1.0, 1.0, 3.0]))["rewards/accuracy"]
    assert (float(total), float(count)) == (1.5, 3.0)
    total, count = compare_labelled(torch.zeros(2), torch.tensor([True, False]))["rewards/accuracy"]
    assert (float(total), float(count)) == (1.0, 2.0)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_rows_do_not_see_each_other(name: str) -> None:
    """So the sum over any split is the sum over the whole."""
    row = PAIR_LOSSES[name]
    whole = row.pair_loss(CHOSEN, REJECTED, row.numbers).losses
    for index in range(2):
        alone = [
            Answers(a.logprobs[index : index + 1], a.lengths[index : index + 1], a.reference[index])
            for a in (CHOSEN, REJECTED)
        ]
        assert torch.allclose(row.pair_loss(*alone, row.numbers).losses, whole[index])


@pytest.mark.parametrize("name", LOSSES)
def test_the_catalog_says_what_a_loss_needs(name: str) -> None:
    row = LOSSES[name]
    label = torch.tensor([True, False])

    def run(chosen: Answers, rejected: Answers) -> Tensor:
        if row.pair_loss is None:
            return kto(chosen, label, torch.tensor(0.3), row.numbers)[0]
        return row.pair_loss(chosen, rejected, row.numbers).losses

    bare = [Answers(a.logprobs, a.lengths) for a in (CHOSEN, REJECTED)]
    if row.needs_reference:
        with pytest.raises(ValueError, match="needs the reference"):
            run(*bare)
    else:
        assert torch.equal(run(*bare), run(CHOSEN, REJECTED))
    longer = [Answers(a.logprobs, a.lengths * 2, a.reference) for a in (CHOSEN, REJECTED)]
    same = torch.equal(run(*longer), run(CHOSEN, REJECTED))
    assert same is not row.needs_lengths
    assert set(row.takes) <= set(Numbers.__slots__)


def test_an_unknown_loss_gets_a_suggestion() -> None:
    assert find_loss("kto") is LOSSES["kto"]
    with pytest.raises(ValueError, match="did you mean 'simpo'"):
        find_loss("SimPo2")
