"""Groups and pairs against plain dictionaries."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations, pairwise

import numpy as np
import pytest

from raylign.data.dedup.groups import CENTRES, LARGE_GROUP, choose, group, pair, split_pairs


def by_key(keys: np.ndarray) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = defaultdict(list)
    for position, key in enumerate(keys.tolist()):
        groups[key].append(position)
    return {key: members for key, members in groups.items() if len(members) > 1}


@pytest.mark.parametrize("spread", [1, 5, 200, 10**9])
def test_groups_are_those_of_a_dictionary(spread: int) -> None:
    rng = np.random.default_rng(spread)
    keys = rng.integers(0, spread, 400).astype(np.uint64) * np.uint64(0x100000000)
    members, bounds = group(keys)
    found = [members[a:b].tolist() for a, b in pairwise(bounds)]
    assert found == list(by_key(keys).values())


def test_pairs_are_each_once_and_never_of_settled_documents() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 60, 300).astype(np.uint64)
    documents = rng.permutation(1000)[:300]
    documents[10] = documents[11]  # the same document twice
    members, bounds = group(keys)
    codes = pair(members, bounds, documents, np.zeros(300, np.int64), settled=200)
    expected = {
        (min(a, b), max(a, b))
        for positions in by_key(keys).values()
        for a, b in combinations(documents[positions].tolist(), 2)
        if a != b and max(a, b) >= 200
    }
    assert {tuple(p) for p in split_pairs(codes).tolist()} == expected
    assert np.all(np.diff(codes.astype(np.int64)) > 0)


def test_a_large_group_pairs_everyone_with_the_preferred_few() -> None:
    size = LARGE_GROUP + 30
    documents = np.arange(size) + 100
    priority = np.arange(size) % 50
    members, bounds = group(np.zeros(size, np.uint64))
    pairs = split_pairs(pair(members, bounds, documents, priority))
    ranked = sorted(range(size), key=lambda i: (-priority[i], documents[i]))
    centres = {int(documents[i]) for i in ranked[:CENTRES]}
    expected = {(min(a, b), max(a, b)) for a in documents.tolist() for b in centres if a != b}
    assert {tuple(p) for p in pairs.tolist()} == expected
    assert documents[choose(members, bounds, documents, priority)[0]] == documents[ranked[0]]


def test_no_keys() -> None:
    members, bounds = group(np.empty(0, np.uint64))
    empty = np.empty(0, np.int64)
    assert not len(members) and bounds.tolist() == [0]
    assert not len(pair(members, bounds, empty, empty))
