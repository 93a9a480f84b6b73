"""Anchors and matches against every pair of positions."""

from __future__ import annotations

import random

import numpy as np
import pytest

from raylign.data.dedup.substrings import extend, find_anchors
from raylign.data.words import split_words


def draw(rng: random.Random, count: int, vocabulary: int = 500) -> list[str]:
    return [f"w{rng.randrange(vocabulary)}" for _ in range(count)]


@pytest.mark.parametrize("length", [8, 9, 20, 51])
def test_passages_of_the_length_share_an_anchor_at_one_place(length: int) -> None:
    rng = random.Random(length)
    for _ in range(60):
        shared = draw(rng, length)
        before, after = draw(rng, rng.randrange(70)), draw(rng, rng.randrange(70))
        one = [*draw(rng, rng.randrange(70)), *shared, *draw(rng, rng.randrange(70))]
        words = split_words([" ".join(one), " ".join([*before, *shared, *after])])
        hashes, places = find_anchors(words, length)
        start_one = next(i for i in range(len(one)) if one[i : i + length] == shared)
        start_two = words.offsets[1] + len(before)
        width = -(-length // 2)
        inside = [
            {
                (int(h), int(p - start))
                for h, p in zip(hashes, places, strict=True)
                if start <= p <= start + length - width
            }
            for start in (start_one, start_two)
        ]
        assert inside[0] & inside[1]


def test_anchors_are_sparse_and_of_single_documents() -> None:
    rng = random.Random(0)
    texts = [" ".join(draw(rng, 400, 10**6)) for _ in range(20)]
    words = split_words(texts)
    hashes, places = find_anchors(words, 50)
    assert len(hashes) / len(words.hashes) == pytest.approx(2 / 27, rel=0.15)
    alone = [find_anchors(split_words([text]), 50) for text in texts]
    assert np.array_equal(hashes, np.concatenate([h for h, _ in alone]))
    shifted = [p + words.offsets[number] for number, (_, p) in enumerate(alone)]
    assert np.array_equal(places, np.concatenate(shifted))
    assert not len(find_anchors(split_words(["too short", ""]), 50)[0])


def test_the_longest_match_around_a_place() -> None:
    one = np.array([9, 1, 2, 3, 4, 5, 8], np.uint32)
    two = np.array([7, 7, 1, 2, 3, 4, 5], np.uint32)
    assert extend(one, two, 3, 4, False) == (2, 7)
    assert extend(one, one, 3, 3, False) == (0, 7)
    # A document that repeats itself keeps what the match repeats.
    twice = np.array([1, 2, 3, 1, 2, 3], np.uint32)
    assert extend(twice, twice, 1, 4, True) == (3, 6)
    period = np.array([5] * 10, np.uint32)
    start, stop = extend(period, period, 0, 1, True)
    assert start == 1 and stop == 10
