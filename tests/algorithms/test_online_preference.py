from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raylign.algorithms.online_preference import (
    online_dpo_loss,
    pair_numbers,
    pair_signs,
    select_pairs,
)
from raylign.algorithms.policy import Coefficients, PolicyInputs
from raylign.algorithms.weighting import token_weights, weight_total

NUMBERS = Coefficients(beta=0.3)
REWARDS = torch.tensor([1.0, 0.0, 3.0, 3.0, 2.0, 2.0, -1.0, 5.0])
GROUPS = torch.tensor([7, 7, 7, 7, 2, 2, 9, 9])


def test_pairs_are_the_best_and_the_worst_and_ties_give_none() -> None:
    assert select_pairs(REWARDS, GROUPS).tolist() == [[2, 1], [7, 6]]
    assert pair_numbers(REWARDS, GROUPS).tolist() == [-1, 0, 0, -1, -1, -1, 1, 1]
    assert pair_signs(REWARDS, GROUPS).tolist() == [0, -1, 1, 0, 0, 0, -1, 1]
    assert select_pairs(torch.ones(3), torch.arange(3)).shape == (0, 2)
    assert pair_numbers(torch.ones(3), torch.zeros(3).long()).tolist() == [-1] * 3
    with pytest.raises(ValueError, match="not finite"):
        select_pairs(torch.tensor([1.0, math.nan]), torch.zeros(2).long())


def make_inputs(seed: int = 0, width: int = 6) -> PolicyInputs:
    generator = torch.Generator().manual_seed(seed)
    logprobs, reference, entropy = torch.randn(3, 8, width, generator=generator).double()
    mask = torch.rand(8, width, generator=generator) < 0.7
    mask[:, 2] = True
    pairs = pair_numbers(REWARDS, GROUPS)
    trained = mask & (pairs >= 0)[:, None]
    return PolicyInputs(
        logprobs=logprobs.requires_grad_(),
        entropy=entropy,
        old_logprobs=logprobs.detach(),
        behaviour_logprobs=logprobs.detach(),
        advantages=pair_signs(REWARDS, GROUPS)[:, None].expand(8, width).double(),
        weights=token_weights(trained, "sequences", max_tokens=width).double(),
        reference_logprobs=reference,
        pairs=pairs,
    )


def select(inputs: PolicyInputs, rows: list[int], pad: int = 0) -> PolicyInputs:
    def cut(values: Tensor) -> Tensor:
        filler = 0.0 if values is inputs.weights else math.nan
        return torch.nn.functional.pad(values[rows], (0, pad), value=filler)

    assert inputs.reference_logprobs is not None and inputs.pairs is not None
    return PolicyInputs(
        cut(inputs.logprobs),
        cut(inputs.entropy),
        cut(inputs.old_logprobs),
        cut(inputs.behaviour_logprobs),
        cut(inputs.advantages),
        cut(inputs.weights),
        cut(inputs.reference_logprobs),
        inputs.pairs[rows],
    )


def test_mean_over_pairs_as_the_loop_says() -> None:
    inputs = make_inputs()
    assert inputs.reference_logprobs is not None
    loss, metrics = online_dpo_loss(inputs, NUMBERS)
    expected, right = torch.zeros((), dtype=torch.float64), 0
    for chosen, rejected in [(2, 1), (7, 6)]:
        gaps = []
        for row in (chosen, rejected):
            gap = inputs.logprobs[row] - inputs.reference_logprobs[row]
            gaps.append(gap[inputs.weights[row] > 0].sum())
        expected = expected + torch.log1p(torch.exp(-0.3 * (gaps[0] - gaps[1]))) / 2
        right += bool(gaps[0] > gaps[1])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    left, wanted = (torch.autograd.grad(x, inputs.logprobs)[0] for x in (loss, expected))
    torch.testing.assert_close(left, wanted, rtol=1e-6, atol=1e-7)
    assert (left[[0, 3, 4, 5]] == 0).all()  # in no pair
    total, count = metrics["rewards/accuracy"]
    assert (float(total), float(count)) == (right, 2)


def test_a_pair_weighs_what_its_tokens_do() -> None:
    inputs = make_inputs(4)
    trained = inputs.weights > 0
    uneven = torch.where(trained, torch.arange(1.0, 9.0).double()[:, None], 0.0)
    loss, _ = online_dpo_loss(replace(inputs, weights=uneven), NUMBERS)
    expected = torch.zeros((), dtype=torch.float64)
    for rows in ([1, 2], [6, 7]):
        alone = replace(select(inputs, rows), weights=trained[rows] / trained[rows].sum())
        expected = expected + uneven[rows].sum() * online_dpo_loss(alone, NUMBERS)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_any_split_that_keeps_pairs_together_gives_the_same() -> None:
    inputs = make_inputs(1)
    whole, metrics = online_dpo_loss(inputs, NUMBERS)
    (wanted,) = torch.autograd.grad(whole, inputs.logprobs)
    for split in ([[2, 1], [6, 7]], [[1, 0, 2], [3, 4, 5], [7, 6]], [[6, 1, 4, 7, 2]]):
        total, parts = torch.zeros(()), []
        for rows in split:
            loss, measured = online_dpo_loss(select(inputs, rows, pad=2), NUMBERS)
            total, parts = total + loss, [*parts, measured]
        torch.testing.assert_close(total, whole)
        (found,) = torch.autograd.grad(total, inputs.logprobs)
        torch.testing.assert_close(found, wanted)
        for name, (amount, count) in metrics.items():
            torch.testing.assert_close(sum(p[name][0] for p in parts), amount, msg=name)
            assert float(sum(p[name][1] for p in parts)) == pytest.approx(float(count)), name


def test_nothing_to_compare_gives_a_loss_that_can_be_backpropagated() -> None:
    inputs = make_inputs()
    alone = replace(inputs, weights=torch.zeros_like(inputs.weights), pairs=torch.full((8,), -1))
    loss, _ = online_dpo_loss(alone, NUMBERS)
    assert loss == 0 and (torch.autograd.grad(loss, inputs.logprobs)[0] == 0).all()


def test_half_a_pair_is_refused() -> None:
    inputs = make_inputs()
    for rows in ([2, 6, 7], [1, 7], [2, 7]):
        with pytest.raises(ValueError, match="one micro-batch"):
            online_dpo_loss(select(inputs, rows), NUMBERS)
    with pytest.raises(ValueError, match="needs pairs"):
        online_dpo_loss(replace(inputs, pairs=None), NUMBERS)
    with pytest.raises(ValueError, match="reference_logprobs"):
        online_dpo_loss(replace(inputs, reference_logprobs=None), NUMBERS)


def test_weights_of_ranks_share_one_total() -> None:
    """Two ranks with a pair each: the mean over both, not the sum of two means."""
    inputs = make_inputs(2)
    whole, _ = online_dpo_loss(inputs, NUMBERS)
    trained = inputs.weights > 0
    total = weight_total(trained, "sequences")
    assert total == 4
    parts = [
        online_dpo_loss(
            replace(
                select(inputs, rows),
                weights=token_weights(
                    trained[rows], "sequences", max_tokens=6, total=total
                ).double(),
            ),
            NUMBERS,
        )[0]
        for rows in ([1, 2], [6, 7])
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-6, atol=1e-7)
