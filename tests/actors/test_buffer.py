"""Nothing is dropped without a reason, and the counts add up."""

from __future__ import annotations

from collections import Counter

import numpy as np

from actors.buffer import Group, admit, count_staleness
from raylign.records import Trajectory
from raylign.rewards.outcomes import Rejection, reject


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


def refuse(*reasons: str) -> tuple[Rejection, ...]:
    return tuple(reject(trajectory("r", [4]), reason) for reason in reasons)


def test_every_sample_is_admitted_or_counted() -> None:
    nan = refuse("reward is nan")
    groups = [
        Group((trajectory("0", [3, 3]), trajectory("0", [3, 4])), nan, "0"),
        Group((trajectory("1", [1]), trajectory("1", [4]), trajectory("1", [4])), (), "1"),
        Group((trajectory("2", []), trajectory("2", [4])), (), "2"),
        Group((), refuse("reward is nan", "reward raised ValueError"), "3"),
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
    # One by one they are the same, each with the one reason that is its own, and itself.
    each = Counter((request, rejection.reason) for request, rejection in admitted.left_out)
    assert each == by_request
    stale = [r.trajectory for _, r in admitted.left_out if r.reason == "stale"]
    assert stale == [groups[1].trajectories[0]]
    assert admitted.left_out[0] == ("0", nan[0])


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
