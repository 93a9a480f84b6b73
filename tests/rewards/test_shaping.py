from __future__ import annotations

import pytest

from raylign.rewards.shaping import clip_reward, penalise_length


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
