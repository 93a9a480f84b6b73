from __future__ import annotations

import math
import statistics

import pytest
import torch

from raylign.algorithms.values import explained_variance, value_loss


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def test_by_hand() -> None:
    values = row(1.0, 1.0, 0.5, math.nan).requires_grad_()
    old, returns = row(0.0, 1.0, 0.0, math.nan), row(1.0, 3.0, -1.0, math.nan)
    weights = row(0.5, 0.25, 0.25, 0.0)
    loss, metrics = value_loss(values, old, returns, weights, clip=0.2)
    # The first moved from 0 to 1 and is held at 0.2; the third moved away from its return.
    assert loss.item() == pytest.approx(0.5 * (0.5 * 0.8**2 + 0.25 * 2**2 + 0.25 * 1.5**2))
    assert metrics["value/clip_fraction"][0] == 1 and metrics["value/clip_fraction"][1] == 3
    (slope,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(slope, row(0.0, 0.25 * -2.0, 0.25 * 1.5, 0.0))
    free, _ = value_loss(values, old, returns, weights, clip=None)
    assert free.item() == pytest.approx(0.5 * (0.25 * 2**2 + 0.25 * 1.5**2))


def test_clipping_never_pays() -> None:
    """The gradient is the plain one or, where the value was moved too far for its good, none."""
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 8, 7, generator=generator)
    values.requires_grad_()
    weights = torch.full((8, 7), 1 / 56)
    held, metrics = value_loss(values, old, returns, weights, clip=0.2)
    free, _ = value_loss(values, old, returns, weights, clip=None)
    assert held > free
    (clipped,), (plain,) = (torch.autograd.grad(x, values) for x in (held, free))
    stopped = clipped == 0
    assert stopped.sum() == metrics["value/clip_fraction"][0] > 5
    torch.testing.assert_close(clipped[~stopped], plain[~stopped])
    # Stopped only where the value went beyond the bound on the way to its return.
    assert ((returns - old) * (values - old))[stopped].min() > 0
    assert (values - old).abs()[stopped].min() > 0.2


def test_any_split_gives_the_same() -> None:
    generator = torch.Generator().manual_seed(2)
    values, old, returns = torch.randn(3, 6, 9, generator=generator)
    weights = torch.rand(6, 9, generator=generator) * (torch.rand(6, 9, generator=generator) < 0.7)
    values = values.requires_grad_()
    whole, metrics = value_loss(values, old, returns, weights, clip=0.3)
    total, parts = torch.zeros(()), []
    for rows in ([0, 5], [1], [2, 3, 4]):
        inputs = (values[rows], old[rows], returns[rows], weights[rows])
        padded = (torch.nn.functional.pad(x, (0, 2), value=math.nan) for x in inputs[:3])
        loss, measured = value_loss(*padded, torch.nn.functional.pad(inputs[3], (0, 2)), clip=0.3)
        total, parts = total + loss, [*parts, measured]
    torch.testing.assert_close(total, whole)
    (left,), (right,) = (torch.autograd.grad(x, values) for x in (total, whole))
    torch.testing.assert_close(left, right)
    means = {n: float(sum(p[n][0] for p in parts) / sum(p[n][1] for p in parts)) for n in metrics}
    assert means == pytest.approx({n: float(t / c) for n, (t, c) in metrics.items()})
    active = weights > 0
    expected = 1 - statistics.pvariance((returns - values)[active].tolist()) / statistics.pvariance(
        returns[active].tolist()
    )
    assert explained_variance(means) == pytest.approx(expected, abs=1e-6)


def test_explained_variance_at_its_ends() -> None:
    returns, weights = row(1.0, 2.0, 4.0), torch.ones(1, 3)

    def explained(values: torch.Tensor, target: torch.Tensor) -> float:
        _, metrics = value_loss(values, values, target, weights, None)
        return explained_variance({n: float(t / c) for n, (t, c) in metrics.items()})

    assert explained(returns, returns) == 1.0
    assert explained(returns + 7, returns) == pytest.approx(1.0)  # a shift is no variance
    assert explained(torch.zeros(1, 3), returns) == pytest.approx(0.0)
    assert explained(-returns, returns) == pytest.approx(-3.0)
    assert explained(returns, torch.full((1, 3), 0.1)) == 0.0
