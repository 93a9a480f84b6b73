"""Passages that occur word for word elsewhere, found through anchors.

Every passage of at least L words is found without looking at every position: of the hashes of all
k-word windows, k = ceil(L / 2), the smallest of each L - k + 1 in a row is an *anchor* (winnowing;
Schleimer, Wilkerson and Aiken 2003). Two equal passages of L words hold a common anchor at the same
place. From equal anchors the match is extended word by word to both sides, so what is cut is the
whole passage, as with a suffix array (Lee et al. 2022), at 2 / (L - k + 2) anchors a word.

A passage stays in one document: that of the highest priority among all that hold the anchor. What
is cut anywhere is therefore left somewhere.
"""

from __future__ import annotations

import numpy as np

from raylign.data.words import Words, kernel, mix


def find_anchors(words: Words, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (uint64 [A]) and word numbers (int64 [A], over all documents) of the anchors.

    For passages of at least `length` words.
    """
    width = -(-length // 2)
    hashes = np.empty(len(words.hashes), np.uint64)
    places = np.empty(len(words.hashes), np.int64)
    used = _find(words.hashes, words.offsets, width, length - width + 1, hashes, places)
    return hashes[:used], places[:used]


def extend(
    one: np.ndarray, two: np.ndarray, at_one: int, at_two: int, same: bool
) -> tuple[int, int]:
    """The longest match of word sequences `one` and `two` around one[at_one] = two[at_two].

    Returns its first word in `two` and the word after its last. With `same`, the sequences are one
    document, and a match does not reach the place that it repeats.
    """
    return _extend(one, two, at_one, at_two, same)


@kernel
def _find(words, offsets, width, window, hashes, places):
    prime = np.uint64(0x9E3779B97F4A7C15)
    power = np.uint64(1)
    for _ in range(width - 1):
        power *= prime
    used = 0
    ring = np.empty(window, np.uint64)
    for document in range(len(offsets) - 1):
        first = offsets[document]
        count = offsets[document + 1] - first - width + 1
        if count < window:
            continue
        value = np.uint64(0)
        for i in range(width):
            value = value * prime + words[first + i]
        last = -1  # the anchor noted last
        least, place = np.uint64(0), -1
        for i in range(count):
            if i:
                value = (value - words[first + i - 1] * power) * prime + words[
                    first + i + width - 1
                ]
            ring[i % window] = mix(value)
            if place >= 0 and place > i - window:
                if ring[i % window] <= least:
                    least, place = ring[i % window], i
            else:  # the smallest one has left the window; of equal ones the last is taken
                least, place = ring[i % window], i
                for j in range(i - 1, max(-1, i - window), -1):
                    if ring[j % window] < least:
                        least, place = ring[j % window], j
            if i >= window - 1 and place != last:
                hashes[used], places[used] = least, first + place
                used += 1
                last = place
    return used


@kernel
def _extend(one, two, at_one, at_two, same):
    back = 0
    while (
        at_one - back > 0 and at_two - back > 0 and one[at_one - back - 1] == two[at_two - back - 1]
    ):
        if same and at_two - back - 1 <= at_one:
            break
        back += 1
    ahead = 0
    while (
        at_one + ahead < len(one)
        and at_two + ahead < len(two)
        and one[at_one + ahead] == two[at_two + ahead]
    ):
        ahead += 1
    return at_two - back, at_two + ahead
