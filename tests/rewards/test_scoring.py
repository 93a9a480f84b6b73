from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from raylign.algorithms.advantages import group_relative
from raylign.config import ShapingConfig, UserError
from raylign.records import Prompt, Trajectory
from raylign.rewards.outcomes import SourceFailure, read_batch
from raylign.rewards.scoring import (
    Rejection,
    Scored,
    measure,
    rescale,
    shape,
    sum_parts,
    sum_sources,
)
from raylign.rewards.shaping import RunningScale
from raylign.rewards.verifiers import RewardFunction, verify_arithmetic

PROMPT = Prompt("p0", (1,), "What?", "7")


def make(text: str, tokens: int = 1) -> Trajectory:
    return Trajectory(
        prompt_id="p0",
        group_id="g0",
        token_ids=np.arange(1 + tokens, dtype=np.int32),
        loss_mask=np.arange(1 + tokens) > 0,
        logprobs=np.zeros(1 + tokens, np.float32),
        versions=np.arange(1 + tokens, dtype=np.int32) - 1,
        finish_reason="stop",
        text=text,
    )


def give(values: list[Any]):
    """A reward function that answers with `values[int(text)]`, raising the exceptions."""

    def function(completion: str, reference: str) -> Any:
        value = values[int(completion)]
        if isinstance(value, Exception):
            raise value
        return value

    return function


def score(values: list[Any], weights: dict[str, float] | None = None) -> Scored:
    return score_with(give(values), [str(i) for i in range(len(values))], weights)


def score_with(
    function: RewardFunction, texts: list[str], weights: dict[str, float] | None = None
) -> Scored:
    trajectories = [make(text) for text in texts]
    return sum_parts(trajectories, measure(function, trajectories, PROMPT), weights or {})


def test_parts_are_weighed_and_kept() -> None:
    texts = [
        "<work>x</work><answer>7</answer>",
        "<answer>7</answer>",
        "<work>x</work><answer>8</answer>",
        "?",
    ]
    scored = score_with(verify_arithmetic, texts)
    assert [t.reward for t in scored.kept] == pytest.approx([1.1, 1.0, 0.1, 0.0])
    assert scored.kept[0].reward_parts == {"correct": 1.0, "format": 1.0}
    assert [t.text for t in scored.kept] == texts and not scored.rejected


def test_a_part_without_a_weight_weighs_nothing_and_is_kept() -> None:
    scored = score([{"a": 2, "style": 9.0}], {"a": 0.5})
    assert scored.kept[0].reward == 1.0
    assert scored.kept[0].reward_parts == {"a": 2.0, "style": 9.0}


@pytest.mark.parametrize("value", [True, 1, 1.0, np.float32(1), np.int64(1), np.True_, Fraction(1)])
def test_a_plain_number_is_the_total(value: Any) -> None:
    scored = score([value])
    assert scored.kept[0].reward == 1.0 and isinstance(scored.kept[0].reward, float)
    assert scored.kept[0].reward_parts == {"score": 1.0}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (ValueError("bad\nnews"), "reward raised ValueError"),
        (ZeroDivisionError(), "reward raised ZeroDivisionError"),
        (math.nan, "reward is nan"),
        (np.float32("nan"), "reward is nan"),
        (math.inf, "reward is inf"),
        (-math.inf, "reward is -inf"),
        (10**400, "reward is too large"),
        (1e38, "reward is too large"),
        (-1.0000001e9, "reward is too large"),
        (None, "reward is None"),
        ("1.0", "reward is of type str"),
        ([1.0], "reward is of type list"),
        (1j, "reward is of type complex"),
        (torch.tensor(1.0), "reward is of type Tensor"),
        ({}, "reward has no parts"),
        ({"a": math.nan}, "reward part a is nan"),
        ({"a": 1.0, "b": None}, "reward part b is None"),
        ({"a": "1"}, "reward part a is of type str"),
        ({1: 1.0}, "reward part name is of type int"),
        ({"b": 1.0}, "reward lacks part a"),
    ],
)
def test_what_is_no_reward_is_rejected_with_its_reason(value: Any, reason: str) -> None:
    scored = score([{"a": 1.0}, value, {"a": 0.0}], {"a": 1.0})
    assert [t.text for t in scored.kept] == ["0", "2"]
    assert [t.reward for t in scored.kept] == [1.0, 0.0]
    detail = str(value) if isinstance(value, Exception) else ""
    assert scored.rejected == [Rejection("p0", "g0", reason, detail)]


def test_reasons_can_be_counted() -> None:
    scored = score([KeyError("x"), KeyError("y" * 999), math.nan, 1.0], {})
    assert Counter(r.reason for r in scored.rejected) == {
        "reward raised KeyError": 2,
        "reward is nan": 1,
    }
    assert max(len(r.detail) for r in scored.rejected) <= 200


def test_a_function_is_given_what_it_asks_for() -> None:
    def plain(completion: str, reference: str) -> float:
        return float(completion + reference)

    def asking(completion: str, reference: str, *, prompt: str, trajectory: Trajectory) -> float:
        assert trajectory.text == completion
        return float(prompt == "What?") + trajectory.sampled_tokens

    def by_place(completion: str, reference: str, prompt: str = "") -> float:
        return float(prompt == "What?")

    def own_names(prompt: str, trajectory: str) -> float:
        return float(prompt + trajectory)

    for function, reward in ((plain, 17), (asking, 2), (by_place, 1), (own_names, 17)):
        assert [t.reward for t in score_with(function, ["1"]).kept] == [reward]


def test_parts_of_unknown_weight_are_asked_for() -> None:
    assert [t.reward for t in score([{"style": 2.0}, {"style": 3.0}]).kept] == [2.0, 3.0]
    assert score([{"correct": 1, "style": 5.0}]).kept[0].reward == 1.0
    with pytest.raises(UserError, match="gives style, tidy; say what they count with"):
        score([{"style": 2.0, "tidy": 1.0}, math.nan])
    scored = score([{"style": 2.0, "tidy": 1.0}, {"style": 1.0}])
    assert [r.reason for r in scored.rejected] == ["reward has parts of unknown weight"]
    assert score([{"correct": 1.0, "format": 1.0}, {"format": 1.0}]).rejected[0].reason == (
        "reward lacks part correct"
    )


def test_what_says_nothing_of_the_sample_is_not_counted_against_it() -> None:
    for error in (SourceFailure("the machine is down"), UserError("wrong key")):
        with pytest.raises(type(error), match=str(error)):
            score([1.0, error])


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0]])
def test_a_wrong_number_of_values_belongs_to_nobody(values: list[float]) -> None:
    found = read_batch([make("a"), make("b")], values)
    detail = f"{len(values)} for 2 completions"
    assert found == [Rejection("p0", "g0", "reward gave a wrong number of values", detail)] * 2


def test_several_sources_give_one_number_each() -> None:
    trajectories = [make(text) for text in "abcd"]
    scored = sum_sources(
        trajectories,
        {
            "right": [
                {"correct": 1.0, "format": 0.5},
                {"correct": 0.0},
                {"correct": 1.0},
                {"correct": 1.0},
            ],
            "nice": read_batch(trajectories, [0.25, 0.5, Rejection("p0", "g0", "abstained"), 1]),
            "short": [
                {"words": 3.0},
                {"words": 4.0},
                {"words": 1.0},
                Rejection("p0", "g0", "broken"),
            ],
        },
        {"right": 2.0, "nice": 4.0, "short": -0.5},
    )
    assert [(t.text, t.reward) for t in scored.kept] == [("a", 1.5), ("b", 0.0)]
    assert scored.kept[0].reward_parts == {
        "right": 1,
        "right/format": 0.5,
        "nice": 0.25,
        "short": 3,
    }
    assert [r.reason for r in scored.rejected] == ["abstained", "broken"]
    with pytest.raises(UserError, match=r"parts\.odd gives a, b and none of them is called score"):
        sum_sources(trajectories[:1], {"odd": [{"a": 1.0, "b": 2.0}]}, {"odd": 1.0})
    scored = sum_sources(trajectories[:1], {"x": [{"score": 1e9}]}, {"x": 1e300})
    assert [r.reason for r in scored.rejected] == ["reward total is too large"]


def test_totals_are_shaped_in_order() -> None:
    rewards = {1: 1.0, 8: 1.0, 10: -1.0}
    scored = [make("x", tokens).scored(reward, {}) for tokens, reward in rewards.items()]
    config = ShapingConfig(overlong_margin=4, overlong_penalty=2.0, length_coef=0.01, clip=(-2, 1))
    shaped = [t.reward for t in shape(scored, config, longest=10)]
    assert shaped == pytest.approx([0.99, 1 - 2 * 0.5 - 0.08, -2])
    assert shape(scored, ShapingConfig(), longest=10)[1].reward == 1.0


def test_running_scale_is_of_all_steps_and_comes_before_the_clip() -> None:
    config = ShapingConfig(scale="running", clip=(-1, 1))
    first, second = [[make("x").scored(r, {}) for r in rs] for rs in ([0.0, 4.0], [2.0, 2.0])]
    assert [t.reward for t in shape(first, config, longest=9)] == [0.0, 4.0]  # not clipped yet
    settled, scale = rescale(first, config, RunningScale())
    assert [t.reward for t in settled] == [0.0, 1.0]
    settled, scale = rescale(second, ShapingConfig(scale="running"), scale)
    assert [t.reward for t in settled] == pytest.approx([2 / np.std([0, 4, 2, 2], ddof=1)] * 2)
    assert rescale(first, ShapingConfig(), scale) == (first, scale)


def test_a_weight_for_no_part_is_the_users_mistake() -> None:
    with pytest.raises(UserError) as error:
        score([{"right": 1.0, "tidy": 0.0}, math.nan], {"right": 1.0, "corect": 2.0})
    assert str(error.value) == (
        "align.reward.weights names corect, which the source does not give; "
        "weigh some of its parts instead: right, tidy"
    )


def test_nothing_to_score_and_nothing_scored() -> None:
    assert score([]).kept == []
    # No part is known, so no weight is known to be wrong.
    scored = score([math.nan, None], {"correct": 1.0})
    assert scored.kept == [] and len(scored.rejected) == 2


def test_interrupts_are_not_swallowed() -> None:
    def interrupted(completion: str, reference: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_with(interrupted, ["0"])


@pytest.mark.parametrize("poison", [math.nan, RuntimeError("broken"), None])
def test_a_poisoned_sample_leaves_its_siblings_advantages_as_if_it_had_never_been(
    poison: Any,
) -> None:
    healthy = [1.0, 0.0, 0.25, 1.0]

    def advantages(values: list[Any]) -> list[float]:
        kept = score(values, {}).kept
        rewards = torch.tensor([t.reward for t in kept])
        groups = torch.zeros(len(kept), dtype=torch.int64)
        return group_relative(rewards, groups, scale_by_std=True).tolist()

    for place in range(5):
        assert advantages([*healthy[:place], poison, *healthy[place:]]) == advantages(healthy)
