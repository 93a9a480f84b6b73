from __future__ import annotations

import json
import math
import statistics

import pytest

from raylign.rewards.shaping import RunningScale, charge_length, clip_reward, penalise_length


def test_length_penalty_is_piecewise_linear() -> None:
    lengths = [0, 16, 17, 18, 19, 20, 21, 99]
    penalties = [penalise_length(n, longest=20, margin=4) for n in lengths]
    assert penalties == [0, 0, -0.25, -0.5, -0.75, -1, -1, -1]


def test_length_penalty_over_the_whole_length() -> None:
    assert [penalise_length(n, longest=4, margin=4) for n in range(5)] == [
        0,
        -0.25,
        -0.5,
        -0.75,
        -1,
    ]


@pytest.mark.parametrize("margin", [0, -1, 21])
def test_a_margin_that_cannot_be(margin: int) -> None:
    with pytest.raises(ValueError, match=r"must be in 1\.\.20"):
        penalise_length(5, longest=20, margin=margin)


def test_clip() -> None:
    assert [clip_reward(x, -1, 2) for x in (-5, -1, 0.5, 2, 7)] == [-1, -1, 0.5, 2, 2]
    with pytest.raises(ValueError, match="low=3 exceeds high=2"):
        clip_reward(0, 3, 2)


def test_each_token_costs() -> None:
    assert charge_length(0, 0.5) == 0 and charge_length(30, 0.01) == pytest.approx(-0.3)
    for tokens, price in ((-1, 0.1), (1, -0.1)):
        with pytest.raises(ValueError, match="must not be below 0"):
            charge_length(tokens, price)


def test_running_scale_is_the_deviation_of_everything() -> None:
    rewards = [math.sin(7.0 * n) * 3 + 1e3 for n in range(50)]
    scale = RunningScale()
    for first in range(0, 50, 7):
        scale = scale.include(rewards[first : first + 7])
    assert scale.count == 50
    assert scale.mean == pytest.approx(statistics.fmean(rewards), rel=1e-14)
    assert scale.deviation == pytest.approx(statistics.stdev(rewards), rel=1e-10)
    assert scale.scale(5.0) == pytest.approx(5.0 / statistics.stdev(rewards))
    assert scale.scale(-5.0) == -scale.scale(5.0) and scale.scale(0.0) == 0


def test_running_scale_does_not_depend_on_order_or_split() -> None:
    rewards = [0.1, 5.0, -3.0, 0.7, 2.0]
    whole = RunningScale().include(rewards)
    assert RunningScale().include(reversed(rewards)) == whole
    left, right = RunningScale().include(rewards[:2]), RunningScale().include(rewards[2:])
    for merged in (left.merge(right), right.merge(left), left.include([]).include(rewards[2:])):
        assert (merged.mean, merged.m2) == pytest.approx((whole.mean, whole.m2))


def test_running_scale_without_spread_changes_nothing() -> None:
    assert RunningScale().scale(3.0) == 3.0
    assert RunningScale().include([7.0]).scale(3.0) == 3.0
    same = RunningScale()
    for count in range(1, 9):
        same = same.include([0.1] * count)
    assert same.deviation == 0 and same.scale(0.1) == 0.1


def test_running_scale_goes_through_a_checkpoint() -> None:
    scale = RunningScale().include([0.1, 0.2, 0.7])
    again = RunningScale.from_dict(json.loads(json.dumps(scale.to_dict())))
    assert again == scale
    assert again.include([0.3]) == scale.include([0.3]) != scale
    with pytest.raises(AttributeError):
        scale.count = 0  # type: ignore[misc]


def test_running_scale_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="not finite"):
        RunningScale().include([1.0, math.nan])
