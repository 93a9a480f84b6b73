"""Pairs are as far apart as they can be, use no completion twice, and never lack a gap."""

from __future__ import annotations

import itertools
import random

from raylign.rewards.contrast import choose_pairs


def test_the_best_meets_the_worst() -> None:
    rewards, texts = [0.5, 1.0, 0.0, 0.75], ["a", "b", "c", "d"]
    assert choose_pairs(rewards, texts, 1, 0.0) == [(1, 2)]
    assert choose_pairs(rewards, texts, 9, 0.0) == [(1, 2), (3, 0)]
    assert choose_pairs(rewards, texts, 9, 0.3) == [(1, 2)]
    assert choose_pairs([1.0, 1.0], ["a", "b"], 1, 0.0) == []
    assert choose_pairs([], [], 1, 0.0) == []


def test_the_same_text_is_one_completion() -> None:
    assert choose_pairs([1.0, 0.0], ["a", "a"], 1, 0.0) == []
    assert choose_pairs([0.0, 1.0, 0.0], ["a", "b", "a"], 2, 0.0) == [(1, 0)]


def test_any_other_choice_is_no_farther_apart() -> None:
    rng = random.Random(0)
    for _ in range(50):
        rewards = [rng.randrange(4) / 4 for _ in range(6)]
        pairs = choose_pairs(rewards, list("abcdef"), 3, 0.0)
        used = [index for pair in pairs for index in pair]
        assert len(set(used)) == len(used)
        assert all(rewards[better] > rewards[worse] for better, worse in pairs)
        total = sum(rewards[better] - rewards[worse] for better, worse in pairs)
        best = max(
            sum(
                max(0.0, rewards[a] - rewards[b])
                for a, b in zip(order[::2], order[1::2], strict=True)
            )
            for order in itertools.permutations(range(6))
        )
        assert abs(total - best) < 1e-12
