"""Nothing is dropped without a reason, and the counts add up."""

from __future__ import annotations

import numpy as np

from actors.buffer import Group, admit, count_staleness
from raylign.records import Trajectory


def trajectory(group: str, versions: list[int], reward: float = 1.0) -> Trajectory:
    n = len(versions)
    return Trajectory(
        prompt_id="p",
        group_id=group,
        token_ids=np.arange(n + 1, dtype=np.int32),
        loss_mask=np.arange(n + 1) >= 1,
        logprobs=np.zeros(n + 1, np.float32),
        versions=np.array([-1, *versions], np.int32),
        finish_reason="stop",
        text="",
        reward=reward,
    )


def test_every_sample_is_admitted_or_counted() -> None:
    groups = [
        Group((trajectory("0", [3, 3]), trajectory("0", [3, 4])), ("reward is nan",), "0"),
        Group((trajectory("1", [1]), trajectory("1", [4]), trajectory("1", [4])), (), "1"),
        Group((trajectory("2", []), trajectory("2", [4])), (), "2"),
        Group((), ("reward is nan", "reward raised ValueError"), "3"),
    ]
    admitted = admit(groups, needs_groups=True, version=4, max_staleness=1)
    assert admitted.dropped == {
        "reward is nan": 2,
        "stale": 1,
        "empty": 1,
        "alone in its group": 1,
        "reward raised ValueError": 1,
    }
    assert admitted.groups == (0, 0, 1, 1)
    dispatched = sum(len(g.trajectories) + len(g.rejected) for g in groups)
    assert dispatched == len(admitted.trajectories) + sum(admitted.dropped.values())
    assert admitted.trained == {"0": 2, "1": 2}
    by_request = {(d.request, d.reason): d.completions for d in admitted.drops}
    assert by_request["2", "empty"] == by_request["2", "alone in its group"] == 1
    assert by_request["3", "reward is nan"] == by_request["0", "reward is nan"] == 1


def test_groups_that_teach_nothing_are_dropped_where_spread_is_needed() -> None:
    same = Group((trajectory("0", [4], 0.5), trajectory("0", [4], 0.5)), (), "0")
    spread = Group((trajectory("1", [4], 0.5), trajectory("1", [4], 1.0)), (), "1")
    assert not same.spread and spread.spread
    admitted = admit(
        [same, spread], needs_groups=True, version=4, max_staleness=0, needs_spread=True
    )
    assert admitted.dropped == {"no spread": 2} and admitted.trained == {"1": 2}
    assert admit([same], needs_groups=True, version=4, max_staleness=0).dropped == {}


def test_a_lone_sample_is_kept_when_groups_do_not_matter() -> None:
    admitted = admit(
        [Group((trajectory("0", [4]),))], needs_groups=False, version=4, max_staleness=0
    )
    assert len(admitted.trajectories) == 1 and admitted.dropped == {}


def test_the_oldest_token_decides() -> None:
    mixed = Group((trajectory("0", [2, 4]), trajectory("0", [3, 4])))
    assert admit([mixed], needs_groups=False, version=4, max_staleness=1).dropped == {"stale": 1}
    assert admit([mixed], needs_groups=False, version=4, max_staleness=2).dropped == {}


def test_staleness_counts_sampled_tokens_only() -> None:
    mean, largest = count_staleness([trajectory("0", [4, 4]), trajectory("0", [3, 1])], 4)
    assert mean == (0 + 0 + 1 + 3) / 4
    assert largest == 3
    assert count_staleness([], 4) == (0.0, 0)
