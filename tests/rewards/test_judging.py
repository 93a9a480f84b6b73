"""Pairs, orders and shares of wins against brute force, and numbers worked out by hand."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from raylign.rewards.judging import (
    JudgeTally,
    PairVerdict,
    Preference,
    advise_workers,
    average_marks,
    choose_pairs,
    list_preferences,
    measure_agreement,
    settle_pair,
    win_shares,
)


def test_a_circle_shows_everybody_first_once() -> None:
    assert choose_pairs(4, 0, 7) == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert choose_pairs(1, 0, 7) == choose_pairs(0, 3, 7) == []
    drawn = Counter(choose_pairs(2, 0, seed)[0] for seed in range(200))
    assert set(drawn) == {(0, 1), (1, 0)} and min(drawn.values()) > 60  # no place is favoured


@pytest.mark.parametrize("count", range(2, 9))
def test_drawn_pairs_are_different_and_even(count: int) -> None:
    every = count * (count - 1) // 2
    for pairs, seed in itertools.product(range(1, every + 3), range(5)):
        drawn = choose_pairs(count, pairs, seed)
        assert len({frozenset(pair) for pair in drawn}) == len(drawn) == min(pairs, every)
        met = Counter(place for pair in drawn for place in pair)
        degrees = [met[place] for place in range(count)]
        assert max(degrees) - min(degrees) <= 1 + (2 * pairs > count)
        assert min(degrees) >= 1 or 2 * pairs < count
        assert drawn == choose_pairs(count, pairs, seed)
    if count > 2:
        assert len({tuple(choose_pairs(count, 2, seed)) for seed in range(20)}) > 5


# Verdict in one order, in the other (as it was shown), the first's share, whether they differ.
ORDERS = [
    (1.0, 0.0, 1.0, False),
    (0.0, 1.0, 0.0, False),
    (0.5, 0.5, 0.5, False),
    (1.0, 1.0, 0.5, True),  # whoever is shown first
    (0.0, 0.0, 0.5, True),
    (1.0, 0.5, 0.5, True),
    (0.5, 1.0, 0.5, True),
]


@pytest.mark.parametrize(("ahead", "behind", "share", "differs"), ORDERS)
def test_both_orders_must_agree_on_a_winner(
    ahead: float, behind: float, share: float, differs: bool
) -> None:
    found = settle_pair((2, 5), [ahead], [behind])
    assert found == PairVerdict((2, 5), share, 1, int(not differs), int(differs), None)
    single = settle_pair((2, 5), [ahead], None)
    assert (single.share, single.consistent, single.contradicted) == (ahead, 0, 0)


def test_samples_are_averaged_and_half_of_one_is_none() -> None:
    found = settle_pair((0, 1), [1.0, 1.0, None, 0.0], [0.0, 1.0, 0.0, None])
    assert found == PairVerdict((0, 1), 0.75, 2, 1, 1, 0.5)
    assert settle_pair((0, 1), [None], [1.0]).share is None


def test_win_shares_by_hand_and_brute_force() -> None:
    def outcome(pair: tuple[int, int], share: float | None) -> PairVerdict:
        return PairVerdict(pair, share, 1, 0, 0, None)

    circle = [outcome((0, 1), 1.0), outcome((1, 2), 0.5), outcome((2, 0), 0.0)]
    assert win_shares(3, circle) == [1.0, 0.25, 0.25]
    assert win_shares(3, [outcome((0, 1), None), outcome((1, 2), 1.0)]) == [None, 1.0, 0.0]
    assert list_preferences([*circle, outcome((4, 3), 0.25), outcome((1, 0), None)]) == [
        Preference(0, 1, 1.0),
        Preference(0, 2, 1.0),
        Preference(3, 4, 0.5),
    ]
    rng = random.Random(0)
    for _ in range(50):
        count = rng.randint(2, 7)
        drawn = choose_pairs(count, rng.randint(0, 9), rng.randint(0, 9))
        shares = {pair: rng.choice([0.0, 0.5, 1.0, None]) for pair in drawn}
        found = win_shares(count, [outcome(pair, share) for pair, share in shares.items()])
        for place in range(count):
            won = []
            for (first, second), share in shares.items():
                if share is not None and place in (first, second):
                    won.append(share if place == first else 1 - share)
            assert found[place] == (pytest.approx(sum(won) / len(won)) if won else None)
        decided = sum(share is not None for share in shares.values())
        assert sum(share is not None for share in found) == len(
            {p for pair, share in shares.items() if share is not None for p in pair}
        )
        if decided == len(drawn) and drawn == choose_pairs(count, 0, 0) and count > 2:
            assert sum(s for s in found if s is not None) == pytest.approx(count / 2)


def test_averages_and_agreement() -> None:
    assert average_marks([0.2, None, 0.4]) == pytest.approx(0.3)
    assert average_marks([None]) is None
    assert measure_agreement([1.0]) is None
    assert measure_agreement([0.5, 0.5, 0.5]) == 1.0
    assert measure_agreement([1.0, 1.0, 0.0]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("waiting", "workers", "advice"),
    [
        (0, 1, 1),
        (0, 3, 2),
        (64, 1, 1),
        (65, 1, 2),
        (130, 2, 3),
        (999, 4, 4),
        (999, 6, 6),
        (5, 3, 3),
    ],
)
def test_workers_follow_the_queue(waiting: int, workers: int, advice: int) -> None:
    assert advise_workers(waiting, workers, least=1, most=4, queue=64) == advice


def test_the_tally_names_what_it_counts() -> None:
    tally = JudgeTally()
    assert "judge/order_consistency" not in tally.take()
    tally.calls, tally.verdicts, tally.abstentions = 4, 5, 1
    for value in (1.0, 1.0, 0.0, 0.5, None):
        tally.choice(value)
    tally.pair(settle_pair((0, 1), [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]))
    tally.answer(0.5)
    tally.answer(1.5)
    found = tally.take()
    assert found["judge/calls"] == 4 and found["judge/contradictions"] == 1
    assert found["judge/abstain_rate"] == pytest.approx(0.2)
    assert found["judge/order_consistency"] == pytest.approx(2 / 3)
    assert found["judge/first_rate"] == pytest.approx(2 / 3)
    assert found["judge/agreement"] == pytest.approx(2 / 3)  # shares 0.5, 1, 1
    assert found["judge/latency_s"] == 1.0
    assert tally.take()["judge/calls"] == 0
