"""What every policy loss promises: any split, any padding, nothing infinite, honest metrics."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raylign.algorithms.catalog import ALGORITHMS
from raylign.algorithms.importance import Importance
from raylign.algorithms.policy import Coefficients, Metrics, PolicyInputs, ppo_clip_loss
from tests.algorithms.test_policy import CASES, NUMBERS, TENSORS, gradient, make_world, take

# Online DPO compares rows with each other; it has tests of its own.
ROWS = [name for name, row in ALGORITHMS.items() if not row.pairwise]


def merge(parts: list[Metrics]) -> dict[str, float]:
    names = parts[0].keys()
    totals = {n: (sum(p[n][0] for p in parts), sum(p[n][1] for p in parts)) for n in names}
    return {name: float(total / count) for name, (total, count) in totals.items()}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    "split",
    [[[0, 1, 2], [3, 4, 5, 6]], [[6], [5], [4], [3], [2], [1], [0]], [[0, 6, 3], [1, 2, 4, 5]]],
)
def test_any_split_gives_the_same_gradient_and_metrics(name: str, split: list[list[int]]) -> None:
    world, row = make_world(1), ALGORITHMS[name]
    inputs = world.inputs(row.weighting)
    whole, metrics = row.loss(inputs, NUMBERS)
    parts, gradients = [], torch.zeros_like(world.theta)
    for rows in split:
        width = max((int(t) + 1 for t in world.mask[rows].any(0).nonzero()), default=1)
        loss, measured = row.loss(take(world.inputs(row.weighting), rows, width), NUMBERS)
        gradients = gradients + gradient(loss, world)
        parts.append(measured)
    torch.testing.assert_close(gradients, gradient(whole, world))
    assert merge(parts) == pytest.approx(merge([metrics]), rel=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_padding_and_weightless_rows_change_nothing_even_if_they_hold_nan(name: str) -> None:
    world, row = make_world(2), ALGORITHMS[name]
    inputs = world.inputs(row.weighting)
    expected, metrics = row.loss(inputs, NUMBERS)

    def surround(name: str) -> Tensor:
        values, filler = getattr(inputs, name), 0.0 if name == "weights" else math.nan
        if not values.requires_grad:  # the model's own output stays where it was not trained
            values = torch.where(world.mask, values, filler)
        return torch.nn.functional.pad(values, (0, 3, 0, 2), value=filler)

    padded = PolicyInputs(**{name: surround(name) for name in TENSORS})
    loss, measured = row.loss(padded, NUMBERS)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, world), gradient(expected, world))
    assert merge([measured]) == pytest.approx(merge([metrics]))


@pytest.mark.parametrize("name", ROWS)
def test_a_batch_of_padding_alone_counts_nothing(name: str) -> None:
    world, row = make_world(2), ALGORITHMS[name]
    inputs = world.inputs(row.weighting)
    loss, metrics = row.loss(replace(inputs, weights=torch.zeros_like(inputs.weights)), NUMBERS)
    assert loss == 0 and (gradient(loss, world) == 0).all()
    assert all(total == 0 and count == 0 for total, count in metrics.values())


@pytest.mark.parametrize("name", ROWS)
def test_the_first_update_is_the_plain_policy_gradient(name: str) -> None:
    """With old = behaviour = current, every algorithm's gradient is that of -A log p."""
    world, row = make_world(3), ALGORITHMS[name]
    inputs = world.inputs(row.weighting, with_reference=False)
    here = inputs.logprobs.detach()
    inputs = replace(inputs, old_logprobs=here, behaviour_logprobs=here)
    loss, metrics = row.loss(inputs, replace(row.coefficients, kl_coef=0.0))
    plain = -(inputs.weights * inputs.advantages * inputs.logprobs).sum()
    torch.testing.assert_close(gradient(loss, world), gradient(plain, world))
    mean = merge([metrics])
    assert mean["importance/mean"] == 1 and mean["clip_fraction"] == 0
    assert mean["importance/truncated"] == 0


@pytest.mark.parametrize("name", ROWS)
def test_ratios_beyond_reason_stay_finite(name: str) -> None:
    world, row = make_world(4), ALGORITHMS[name]
    inputs = world.inputs(row.weighting)
    signs = torch.where(torch.arange(world.mask.shape[1]) % 2 == 0, 2000.0, -2000.0).double()
    inputs = replace(
        inputs,
        old_logprobs=inputs.old_logprobs + signs,
        behaviour_logprobs=inputs.behaviour_logprobs - 3 * signs,
        reference_logprobs=inputs.logprobs.detach() - signs,
    )
    loss, metrics = row.loss(inputs, NUMBERS)
    assert torch.isfinite(loss) and torch.isfinite(gradient(loss, world)).all()
    assert all(torch.isfinite(total) for total, _ in metrics.values())


def test_metrics_by_hand_and_detached() -> None:
    def row(*values: float) -> Tensor:
        return torch.tensor([values])

    inputs = PolicyInputs(
        logprobs=row(0.0, -1.0, -1.0, -1.0).requires_grad_(),
        entropy=row(9.0, 1.0, 2.0, 3.0),
        old_logprobs=row(0.0, -1.5, -1.0, -0.5),  # ratios e^.5, 1, e^-.5
        behaviour_logprobs=row(0.0, -1.5, -2.0, -0.5 - math.log(0.5)),  # importance 1, e, 0.5
        advantages=row(0.0, 1.0, 1.0, 1.0),
        weights=row(0.0, 0.25, 0.25, 0.25),
        reference_logprobs=row(0.0, -1.0, -1.0, -1.0 + math.log(2)),
    )
    loss, metrics = ppo_clip_loss(inputs, Coefficients(importance=Importance(cap=2.0)))
    means = merge([metrics])
    assert means["entropy"] == pytest.approx(2.0)
    assert means["clip_fraction"] == pytest.approx(1 / 3)  # e^.5 with A > 0; e^-.5 is left free
    assert means["importance/mean"] == pytest.approx((1 + 2 + 0.5) / 3)
    assert means["importance/truncated"] == pytest.approx(1 / 3)
    assert means["kl"] == pytest.approx((2 - 1 - math.log(2)) / 3)
    value = -(1.2 + 2 * 1 + 0.5 * math.exp(-0.5))
    assert loss.item() == pytest.approx(0.25 * value)
    assert means["loss"] == pytest.approx(value / 3)
    for total, count in metrics.values():
        assert total.ndim == count.ndim == 0
        assert not total.requires_grad and not count.requires_grad


@pytest.mark.parametrize(
    ("name", "ratio", "advantage", "clipped"),
    [
        ("ppo_clip", 1.31, 1.0, True),
        ("ppo_clip", 1.29, 1.0, False),
        ("ppo_clip", 0.79, 1.0, False),
        ("ppo_clip", 0.79, -1.0, True),
        ("ppo_clip", 0.81, -1.0, False),
        ("ppo_clip", 9.0, -1.0, False),
        ("ppo_clip", 9.0, 0.0, False),
        ("dual_clip", 1.49, -1.0, False),
        ("dual_clip", 1.51, -1.0, True),
        ("dual_clip", 1.31, 1.0, True),
        ("cispo", 1.31, -1.0, True),
        ("cispo", 0.79, 1.0, True),
        ("cispo", 0.81, 1.0, False),
    ],
)
def test_clip_fraction_and_the_gradient_that_clipping_stops(
    name: str, ratio: float, advantage: float, clipped: bool
) -> None:
    logprob = torch.tensor([[-1.0]], requires_grad=True)
    inputs = PolicyInputs(
        logprobs=logprob,
        entropy=torch.zeros(1, 1),
        old_logprobs=torch.tensor([[-1.0 - math.log(ratio)]]),
        behaviour_logprobs=torch.tensor([[-1.0 - math.log(ratio)]]),
        advantages=torch.tensor([[advantage]]),
        weights=torch.ones(1, 1),
    )
    loss_of, numbers = CASES[name]
    loss, metrics = loss_of(inputs, replace(numbers, kl_coef=0.0, entropy_coef=0.0))
    assert metrics["clip_fraction"][0] == float(clipped)
    slope = torch.autograd.grad(loss, logprob)[0]
    if name == "cispo":
        assert slope.item() == pytest.approx(-min(max(ratio, 0.8), 1.3) * advantage)
    else:
        assert slope.item() == pytest.approx(0.0 if clipped else -ratio * advantage)


def test_kl_is_measured_without_being_trained_and_absent_without_a_reference() -> None:
    world = make_world(6)
    free, metrics = ppo_clip_loss(world.inputs("tokens"), Coefficients())
    alone, fewer = ppo_clip_loss(world.inputs("tokens", with_reference=False), Coefficients())
    assert "kl" in metrics and "kl" not in fewer
    torch.testing.assert_close(gradient(free, world), gradient(alone, world))


def test_kl_needs_a_reference() -> None:
    with pytest.raises(ValueError, match=r"kl_coef=0\.1 needs reference_logprobs"):
        ppo_clip_loss(make_world().inputs("tokens", with_reference=False), NUMBERS)
    ppo_clip_loss(
        make_world().inputs("tokens", with_reference=False), replace(NUMBERS, kl_in="reward")
    )


def test_old_behaviour_and_reference_are_constants() -> None:
    world = make_world(7)
    inputs = world.inputs("tokens")
    attached = replace(
        inputs,
        old_logprobs=inputs.logprobs + (world.old - inputs.logprobs.detach()),
        reference_logprobs=inputs.logprobs + (world.reference - inputs.logprobs.detach()),
    )
    for loss_of, numbers in CASES.values():
        left, right = (gradient(loss_of(x, numbers)[0], world) for x in (attached, inputs))
        torch.testing.assert_close(left, right)


def test_a_rejected_sample_leaves_its_siblings_as_if_it_had_never_been() -> None:
    """Advantages, weights and gradient after rejection, against the batch without the sample."""
    world, row = make_world(8), ALGORITHMS["grpo"]
    assert row.advantage is not None
    groups, rewards = torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.rand(7).double()
    rewards[2] = math.nan
    kept = rewards.isfinite().nonzero()[:, 0].tolist()
    never = replace(
        world,
        **{
            name: getattr(world, name)[kept]
            for name in ("tokens", "mask", "old", "behaviour", "reference")
        },
        advantages=row.advantage(rewards[kept], groups[kept]),
    )
    advantages = torch.zeros(7).double()
    advantages[kept] = row.advantage(rewards[kept], groups[kept])
    masked = replace(world, mask=world.mask & rewards.isfinite()[:, None], advantages=advantages)
    left, right = (row.loss(w.inputs(row.weighting), NUMBERS)[0] for w in (masked, never))
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(gradient(left, world), gradient(right, world))
