"""Rows are dealt once, groups stay whole, pairs meet, and nothing depends on the run."""

from __future__ import annotations

import random

import pytest

from raylign.training.minibatches import Cut, Share, share_out

LENGTHS = [9, 3, 7, 7, 20, 4, 5, 5, 12, 6, 8, 8]
GROUPS = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def flatten(micro_batches: tuple[tuple[int, ...], ...]) -> list[int]:
    return [row for micro in micro_batches for row in micro]


def tokens(share: Share) -> int:
    return sum(LENGTHS[row] for row in share.rows)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("minibatches", [1, 2, 4])
def test_every_pass_sees_every_row_once_on_the_rank_that_holds_it(
    ranks: int, minibatches: int
) -> None:
    cut = Cut(ranks, budget=16, passes=2, minibatches=minibatches, seed=5)
    shares = share_out(LENGTHS, GROUPS, cut, version=3)
    assert sorted(row for share in shares for row in share.rows) == list(range(12))
    for share in shares:
        assert len(share.updates) == 2 * minibatches
        assert sorted(flatten(share.scoring)) == list(share.rows)
        for number in range(2):
            steps = share.updates[number * minibatches : (number + 1) * minibatches]
            assert sorted(row for step in steps for row in flatten(step)) == list(share.rows)
        for micro in (m for step in (share.scoring, *share.updates) for m in step if m):
            assert len(micro) * max(LENGTHS[row] for row in micro) <= 16 or len(micro) == 1
    for number, members in enumerate(shares[0].members):
        assert sorted(r for s in shares for r in flatten(s.updates[number])) == list(members)
        assert len({len(share.updates[number]) for share in shares}) == 1
        groups = {GROUPS[row] for row in members}
        assert sorted(row for row in range(12) if GROUPS[row] in groups) == list(members)
    assert len({len(share.scoring) for share in shares}) == 1


def test_passes_are_drawn_from_seed_version_and_pass() -> None:
    def members(seed: int, version: int) -> tuple[tuple[int, ...], ...]:
        groups = list(range(12))
        return share_out(
            LENGTHS, groups, Cut(1, 64, 2, minibatches=3, seed=seed), version
        )[0].members  # fmt: skip

    first = members(1, 0)
    assert members(1, 0) == first
    assert len({first, members(2, 0), members(1, 1)}) == 3
    assert first[:3] != first[3:]


def test_ranks_get_equal_loads() -> None:
    whole = share_out(LENGTHS, GROUPS, Cut(2, 64), version=0)
    assert abs(tokens(whole[0]) - tokens(whole[1])) <= 4
    shares = share_out(LENGTHS, GROUPS, Cut(3, 64, minibatches=4), version=0)
    for members in shares[0].members:  # of every group of three, one row on each
        assert [len(set(share.rows) & set(members)) for share in shares] == [1, 1, 1]


def test_pairs_stay_together_and_other_rows_are_left_out() -> None:
    pairs = [(0, 1), (4, 5), (7, 8), (10, 9)]
    for ranks in (1, 2, 5):
        shares = share_out(LENGTHS, GROUPS, Cut(ranks, 24, minibatches=2), 0, pairs)
        assert sorted(row for share in shares for row in share.rows) == [0, 1, 4, 5, 7, 8, 9, 10]
        for share in shares:
            for micro in (m for step in (share.scoring, *share.updates) for m in step):
                assert [micro[i : i + 2] for i in range(0, len(micro), 2)] == [
                    pair for first in micro[::2] for pair in pairs if pair[0] == first
                ]
                assert len(micro) <= 2 or len(micro) * max(LENGTHS[r] for r in micro) <= 24


def test_fewer_groups_than_minibatches_make_fewer_steps() -> None:
    [share] = share_out([3, 4, 5], [7, 7, 9], Cut(1, 64, passes=2, minibatches=4), 0)
    assert [sorted(members) for members in share.members].count([0, 1]) == 2
    assert len(share.updates) == 4


def test_more_ranks_than_rows_leave_some_with_nothing() -> None:
    shares = share_out([3, 4], [0, 1], Cut(4, 64), 0)
    assert [len(share.rows) for share in shares] == [1, 1, 0, 0]
    assert [len(share.updates[0]) for share in shares] == [1] * 4


def test_random_batches_are_covered() -> None:
    rng = random.Random(1)
    for _ in range(100):
        count = rng.randint(1, 30)
        lengths = [rng.randint(2, 40) for _ in range(count)]
        groups = [rng.randint(0, 5) for _ in range(count)]
        cut = Cut(rng.randint(1, 4), rng.randint(1, 99), 1, rng.randint(1, 6), rng.randint(0, 9))
        shares = share_out(lengths, groups, cut, 0)
        found = [r for share in shares for step in share.updates for r in flatten(step)]
        assert sorted(found) == list(range(count))


def test_without_pairs_there_is_nothing_to_do() -> None:
    for share in share_out(LENGTHS, GROUPS, Cut(2, 64), 0, pairs=[]):
        assert share == Share((), ((),), (), ())
