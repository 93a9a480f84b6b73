from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from raylign.algorithms.advantages import group_relative
from raylign.config import UserError
from raylign.records import Trajectory
from raylign.rewards.scoring import Rejection, score_trajectories
from raylign.rewards.verifiers import verify_arithmetic

WEIGHTS = {"correct": 1.0, "format": 0.1}


def make(text: str, prompt: str = "p0", group: str = "g0") -> Trajectory:
    return Trajectory(
        prompt_id=prompt,
        group_id=group,
        token_ids=np.array([1, 2], np.int32),
        loss_mask=np.array([False, True]),
        logprobs=np.zeros(2, np.float32),
        versions=np.array([-1, 0], np.int32),
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


def score(values: list[Any], weights: dict[str, float]):
    trajectories = [make(str(i)) for i in range(len(values))]
    return score_trajectories(trajectories, {"p0": ""}, give(values), weights)


def test_parts_are_weighed_and_kept() -> None:
    texts = [
        "<work>x</work><answer>7</answer>",
        "<answer>7</answer>",
        "<work>x</work><answer>8</answer>",
        "?",
    ]
    scored = score_trajectories([make(t) for t in texts], {"p0": "7"}, verify_arithmetic, WEIGHTS)
    assert [t.reward for t in scored.kept] == pytest.approx([1.1, 1.0, 0.1, 0.0])
    assert scored.kept[0].reward_parts == {"correct": 1.0, "format": 1.0}
    assert [t.text for t in scored.kept] == texts and not scored.rejected


def test_a_part_without_a_weight_weighs_nothing_and_is_kept() -> None:
    scored = score([{"a": 2, "style": 9.0}], {"a": 0.5})
    assert scored.kept[0].reward == 1.0
    assert scored.kept[0].reward_parts == {"a": 2.0, "style": 9.0}


@pytest.mark.parametrize("value", [True, 1, 1.0, np.float32(1), np.int64(1), np.True_, Fraction(1)])
def test_a_plain_number_is_the_total(value: Any) -> None:
    scored = score([value], WEIGHTS)
    assert scored.kept[0].reward == 1.0 and isinstance(scored.kept[0].reward, float)
    assert scored.kept[0].reward_parts == {}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (ValueError("bad\nnews"), "reward raised ValueError"),
        (ZeroDivisionError(), "reward raised ZeroDivisionError"),
        (math.nan, "reward is nan"),
        (np.float32("nan"), "reward is nan"),
        (math.inf, "reward is inf"),
        (-math.inf, "reward is -inf"),
        (10**400, "reward is too large for a float"),
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


def test_each_prompt_has_its_own_reference() -> None:
    trajectories = [make("a", "p0"), make("b", "p1"), make("c", "gone")]

    def same(completion: str, reference: str) -> float:
        return float(completion == reference)

    scored = score_trajectories(trajectories, {"p0": "a", "p1": "a"}, same, {})
    assert [t.reward for t in scored.kept] == [1.0, 0.0]
    assert scored.rejected == [Rejection("gone", "g0", "prompt has no reference")]


def test_a_weight_for_no_part_is_the_users_mistake() -> None:
    with pytest.raises(UserError) as error:
        score([{"right": 1.0, "tidy": 0.0}, math.nan], {"right": 1.0, "corect": 2.0})
    assert str(error.value) == (
        "align.reward.weights names corect, which the reward function does not give; "
        "weigh some of its parts instead: right, tidy"
    )


def test_nothing_to_score_and_nothing_scored() -> None:
    assert score([], WEIGHTS).kept == []
    scored = score([math.nan, None], WEIGHTS)  # no part is known, so no weight is known to be wrong
    assert scored.kept == [] and len(scored.rejected) == 2


def test_interrupts_are_not_swallowed() -> None:
    def interrupted(completion: str, reference: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_trajectories([make("0")], {"p0": ""}, interrupted, {})


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
