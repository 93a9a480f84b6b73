"""Who stays: documents in order of preference, each unless a kept one resembles it.

Connected components, the usual way, chain: A like B like C removes C for an A that it does not
resemble. Here a document goes only for a *kept* document that was compared with it.
"""

from __future__ import annotations

import numpy as np

from raylign.data.words import kernel


def count_agreement(sketches: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Equal sketch bytes of each pair; int64 [P] for uint8 [N, K] and int64 [P, 2]."""
    return _count_equal(sketches, np.ascontiguousarray(pairs, np.int64).reshape(-1, 2))


def choose_keepers(
    pairs: np.ndarray, agreed: np.ndarray, priority: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Who stands for each of N documents, given pairs that are similar enough.

    `pairs` is int64 [P, 2], `agreed` int64 [P] and `priority` int64 [N] (higher stays; ties go to
    the first). Returns the keeper of each document (int64 [N], itself when kept) and what it agreed
    with that one (int64 [N], -1 when kept). A document that is removed has the most similar of its
    kept neighbours, the first of equally similar ones.
    """
    size = len(priority)
    source = np.concatenate([pairs[:, 0], pairs[:, 1]])
    target = np.concatenate([pairs[:, 1], pairs[:, 0]])
    weight = np.concatenate([agreed, agreed])
    degree = np.bincount(source, minlength=size)
    order = np.argsort(source, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(degree)]).astype(np.int64)
    linked = np.flatnonzero(degree)
    visit = linked[np.argsort(-priority[linked], kind="stable")]
    return _visit(offsets, target[order], weight[order], visit, size)


@kernel
def _count_equal(sketches, pairs):
    agreed = np.zeros(len(pairs), np.int64)
    for p in range(len(pairs)):
        one, two = pairs[p, 0], pairs[p, 1]
        count = 0
        for j in range(sketches.shape[1]):
            count += sketches[one, j] == sketches[two, j]
        agreed[p] = count
    return agreed


@kernel
def _visit(offsets, neighbours, agreed, order, size):
    keeper = np.arange(size)
    similar = np.full(size, -1, np.int64)
    settled = np.zeros(size, np.bool_)
    for document in order:
        if settled[document]:
            continue
        settled[document] = True
        for i in range(offsets[document], offsets[document + 1]):
            other = neighbours[i]
            # Already gone for a kept one that it resembles less: this one explains it better.
            if not settled[other] or (keeper[other] != other and agreed[i] > similar[other]):
                settled[other] = True
                keeper[other] = document
                similar[other] = agreed[i]
    return keeper, similar
