from __future__ import annotations

import math

import pytest
import torch

from raylign.algorithms.kl import ESTIMATORS, AdaptiveKL, k1, k2, k3


def test_by_hand() -> None:
    policy, reference = torch.tensor(math.log(0.5)), torch.tensor(math.log(0.25))
    ratio = 0.5
    assert k1(policy, reference) == pytest.approx(math.log(2))
    assert k2(policy, reference) == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(policy, reference) == pytest.approx(ratio - 1 + math.log(2))


def _distributions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    return logits[0].log_softmax(0), logits[1].log_softmax(0)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_expectation_under_the_policy_is_the_divergence(name: str) -> None:
    policy, reference = _distributions()
    exact = sum(p.exp() * (p - q) for p, q in zip(policy, reference, strict=True))
    torch.testing.assert_close((policy.exp() * ESTIMATORS[name](policy, reference)).sum(), exact)


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_never_negative_and_zero_at_the_reference(name: str) -> None:
    policy, reference = torch.randn(2, 500, generator=torch.Generator().manual_seed(1)) * 4
    assert (ESTIMATORS[name](policy, reference) >= 0).all()
    assert (ESTIMATORS[name](policy, policy) == 0).all()


def test_gradients_as_losses() -> None:
    """What the module's docstring says: k1 nothing, k2 descends KL(p||q), k3 descends KL(q||p)."""
    logits = torch.randn(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    q = torch.randn(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log_softmax(
        0
    )
    logits.requires_grad_()

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits)[0]

    p = logits.log_softmax(0)
    sampled = p.exp().detach()
    reverse = gradient((p.exp() * (p - q)).sum())
    torch.testing.assert_close(gradient((sampled * k2(logits.log_softmax(0), q)).sum()), reverse)
    nothing = gradient((sampled * k1(logits.log_softmax(0), q)).sum())
    torch.testing.assert_close(nothing, torch.zeros_like(nothing))
    forward = gradient(-(q.exp() * logits.log_softmax(0)).sum())
    torch.testing.assert_close(gradient((sampled * k3(logits.log_softmax(0), q)).sum()), forward)


def test_k3_stays_finite_far_from_the_reference() -> None:
    policy = torch.tensor([-500.0, 0.0], requires_grad=True)
    value = k3(policy, torch.tensor([0.0, -500.0]))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert policy.grad is not None and torch.isfinite(policy.grad).all()


def test_k1_taken_off_a_reward_descends_the_divergence() -> None:
    """REINFORCE with -k1 as the reward, exactly, over all tokens."""
    logits = torch.randn(5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logits.requires_grad_()
    p, q = logits.log_softmax(0), torch.full((5,), 0.2, dtype=torch.float64).log()
    (exact,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    cost = k1(p, q).detach()
    (estimate,) = torch.autograd.grad((p.exp().detach() * cost * p).sum(), logits)
    torch.testing.assert_close(estimate, exact)


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (-3.0, 0.98)]
)
def test_the_coefficient_follows_the_divergence(kl: float, factor: float) -> None:
    """Numbers of Ziegler et al.: a tenth of the horizon moves it by at most a fiftieth."""
    control = AdaptiveKL(coef=0.2, target=6.0, horizon=10_000)
    assert control.update(kl, 1_000) == pytest.approx(0.2 * factor)
    assert control.coef == 0.2


def test_the_coefficient_finds_the_target() -> None:
    """A policy whose divergence is inversely proportional to the coefficient."""
    coef = 5.0
    for _ in range(400):
        coef = AdaptiveKL(coef, target=0.1, horizon=1000).update(0.02 / coef, 100)
    assert 0.02 / coef == pytest.approx(0.1, rel=0.01)


def test_the_coefficient_stays_positive_however_large_the_batch() -> None:
    assert AdaptiveKL(1.0, 1.0, 10.0).update(0.0, 10_000) == pytest.approx(0.8)


def test_a_controller_that_cannot_be() -> None:
    for numbers in ((0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, math.nan)):
        with pytest.raises(ValueError, match="must be above 0"):
            AdaptiveKL(*numbers)
    with pytest.raises(ValueError, match="kl_mean=nan is no mean KL"):
        AdaptiveKL(1.0, 1.0, 1.0).update(math.nan, 1)
