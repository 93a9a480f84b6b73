"""Trajectories refuse what cannot be; batches keep every token of every row in its place."""

from __future__ import annotations

import random
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from raylign.records import Batch, Prompt, Trajectory, collate, split_by_tokens


def make(prompt: int, completion: int, start: int = 0, version: int = 0) -> Trajectory:
    """Token t is start + t, its log-probability -t, its version `version`."""
    length = prompt + completion
    mask = np.arange(length) >= prompt
    index = np.arange(length, dtype=np.float32)
    return Trajectory(
        prompt_id=f"p{start}",
        group_id="g",
        token_ids=np.arange(start, start + length, dtype=np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -index, 0.0).astype(np.float32),
        versions=np.where(mask, version, -1).astype(np.int32),
        finish_reason="stop",
        text="",
    )


def test_a_prompt_needs_tokens() -> None:
    with pytest.raises(ValueError, match="prompt p1 has no tokens"):
        Prompt("p1", (), "", "")


@pytest.mark.parametrize("name", ["loss_mask", "logprobs", "versions"])
def test_arrays_of_a_trajectory_have_one_length(name: str) -> None:
    whole = make(2, 3)
    with pytest.raises(ValueError, match=rf"prompt p0: {name} has 4 entries for 5 tokens"):
        replace(whole, **{name: getattr(whole, name)[:-1]})


def test_token_zero_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="token 0 cannot be trained"):
        make(0, 3)


def test_a_trajectory_is_frozen_and_scored_by_copy() -> None:
    before = make(2, 3)
    after = before.scored(1.1, {"correct": 1.0, "format": 0.1})
    assert (before.reward, before.reward_parts) == (None, {})
    assert (after.reward, after.reward_parts) == (1.1, {"correct": 1.0, "format": 0.1})
    with pytest.raises(FrozenInstanceError):
        after.reward = 2.0  # type: ignore[misc]


def test_versions_span_the_sampled_tokens_alone() -> None:
    mixed = replace(make(2, 3), versions=np.array([-1, -1, 4, 5, 5], np.int32))
    assert mixed.version_span == (4, 5)
    assert mixed.sampled_tokens == 3
    # A tool's output within the completion was sampled by nobody.
    tool = replace(
        mixed,
        loss_mask=np.array([False, False, True, False, True]),
        versions=np.array([-1, -1, 4, -1, 6], np.int32),
    )
    assert (tool.version_span, tool.sampled_tokens) == ((4, 6), 2)
    assert make(3, 0).version_span == (-1, -1)


def test_collate_pads_right_and_masks_everything_it_adds() -> None:
    rows = [make(2, 2, start=10, version=3).scored(2.5, {}), make(1, 4, start=20, version=4)]
    per_token = np.array([9.0, 0.1, 0.2, 0.3, 0.4])  # the untrained 9 must vanish
    batch = collate(rows, [0.5, per_token], [0.25, 1.0], pad_id=7)
    assert batch.tokens.tolist() == [[10, 11, 12, 13, 7], [20, 21, 22, 23, 24]]
    assert batch.lengths.tolist() == [4, 5]
    assert batch.loss_mask.tolist() == [[False, False, True, True, False], [False] + [True] * 4]
    assert batch.behaviour_logprobs.tolist() == [[0, 0, -2, -3, 0], [0, -1, -2, -3, -4]]
    assert batch.versions.tolist() == [[-1, -1, 3, 3, -1], [-1, 4, 4, 4, 4]]
    torch.testing.assert_close(
        batch.advantages, torch.tensor([[0, 0, 0.5, 0.5, 0], [0, 0.1, 0.2, 0.3, 0.4]])
    )
    assert batch.weights.tolist() == [[0, 0, 0.25, 0.25, 0], [0, 1, 1, 1, 1]]
    assert batch.rewards.tolist() == [[0, 0, 0, 2.5, 0], [0] * 5]  # the other has none yet
    assert (batch.rows, batch.loss_tokens) == (2, 6)
    kinds = {n: t.dtype for n in Batch.__slots__ if (t := getattr(batch, n)) is not None}
    assert kinds == {
        "tokens": torch.int64,
        "lengths": torch.int64,
        "loss_mask": torch.bool,
        "behaviour_logprobs": torch.float32,
        "versions": torch.int32,
        "advantages": torch.float32,
        "weights": torch.float32,
        "rewards": torch.float32,
    }


def test_a_reward_stands_on_the_last_token_that_was_sampled() -> None:
    tool = replace(make(2, 3), loss_mask=np.array([False, False, True, False, False]))
    silent = make(4, 0)  # it said nothing, and there is no token to hold what it got
    batch = collate([tool.scored(0.5, {}), silent.scored(1.0, {})], [0, 0], [0, 0], pad_id=0)
    assert batch.rewards.tolist() == [[0, 0, 0.5, 0, 0], [0] * 5]


def test_what_the_learner_fills_in_goes_with_its_rows() -> None:
    batch = collate([make(1, 2), make(1, 4)], [0, 0], [0, 0], pad_id=0)
    values = torch.arange(10.0).view(2, 5)
    filled = replace(batch, values=values)
    assert filled.select([0]).values.tolist() == [[0, 1, 2]]
    moved = filled.to(torch.device("meta"))
    assert moved.values.is_meta and moved.returns is None


def test_collate_refuses_what_does_not_match() -> None:
    with pytest.raises(ValueError, match="empty list"):
        collate([], [], [], pad_id=0)
    with pytest.raises(ValueError):
        collate([make(1, 2), make(1, 2)], [1.0], [1.0, 1.0], pad_id=0)


def test_selecting_rows_is_collating_them() -> None:
    lengths = [(1, 2), (2, 6), (3, 1), (1, 1)]
    rows = [make(p, c, start=10 * i, version=i) for i, (p, c) in enumerate(lengths)]
    whole = collate(rows, [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0], pad_id=0)
    chosen = [3, 0, 2]
    expected = collate([rows[i] for i in chosen], [0.4, 0.1, 0.3], [4.0, 1.0, 3.0], pad_id=0)
    selected = whole.select(chosen)
    for name in list_filled(expected):
        torch.testing.assert_close(getattr(selected, name), getattr(expected, name))
    assert whole.select([]).rows == 0


def list_filled(batch: Batch) -> list[str]:
    return [name for name in Batch.__slots__ if getattr(batch, name) is not None]


def cover(groups: list[list[int]]) -> list[int]:
    return sorted(row for group in groups for row in group)


def test_split_keeps_every_row_once_and_the_budget_in_fewest_groups() -> None:
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randint(1, 20) for _ in range(rng.randint(0, 12))]
        budget = rng.randint(1, 60)
        groups = split_by_tokens(lengths, budget)
        assert cover(groups) == list(range(len(lengths)))
        for group in groups:
            widest = max(lengths[row] for row in group)
            assert len(group) == 1 or len(group) * widest <= budget
        assert len(groups) == fewest_groups(lengths, budget)


def fewest_groups(lengths: list[int], budget: int) -> int:
    """By trying every cut of the rows in order of length.

    Some best split is of this form: exchanging rows so that each group takes a run of the order
    never widens a group.
    """
    ordered = sorted(lengths, reverse=True)
    best = [0]
    for end in range(1, len(ordered) + 1):
        best.append(
            1
            + min(
                best[start]
                for start in range(end)
                if end - start == 1 or (end - start) * ordered[start] <= budget
            )
        )
    return best[-1]


def test_split_is_the_same_whatever_the_hash_seed() -> None:
    assert split_by_tokens([3, 5, 3, 5, 1], 10) == [[1, 3], [0, 2, 4]]
    assert split_by_tokens([100], 10) == [[0]]
    assert split_by_tokens([], 10) == []
