"""Documents that share a key, as groups and as pairs.

A pair is one number, `earlier << 32 | later`, so that sets of pairs are sorted, merged and cut by
plain integer operations.
"""

from __future__ import annotations

import numpy as np

from raylign.data.words import kernel

# A key shared by more documents than this pairs them with the preferred few only: the number of
# pairs stays linear where boilerplate makes thousands alike.
LARGE_GROUP = 64
CENTRES = 4
MOST_DOCUMENTS = 1 << 32


def group(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of equal `keys` (uint64 [M]), group after group, and the groups' bounds.

    Keys that occur once are in no group. Returns int64 [G] and int64 [groups + 1].
    """
    capacity = 1 << max(4, (2 * len(keys)).bit_length())
    return _group(keys, np.empty(capacity, np.uint64), np.zeros(capacity, np.int32))


def pair(
    members: np.ndarray,
    bounds: np.ndarray,
    documents: np.ndarray,
    priority: np.ndarray,
    settled: int = 0,
) -> np.ndarray:
    """Pairs (uint64, sorted, each once) of the documents of each group.

    `documents` and `priority` (int64) belong to positions, as `members` names them. Of two
    documents below `settled` no pair is made: what they are to each other is decided. Groups of
    more than `LARGE_GROUP` pair every document with the `CENTRES` of highest priority.
    """
    room = _count_pairs(bounds, LARGE_GROUP, CENTRES)
    codes = np.empty(room, np.uint64)
    used = _pair(
        members, bounds, documents, priority, settled, LARGE_GROUP, min(CENTRES, room), codes
    )
    return np.unique(codes[:used])


def choose(
    members: np.ndarray, bounds: np.ndarray, documents: np.ndarray, priority: np.ndarray
) -> np.ndarray:
    """The preferred position of each group: highest priority, then first document; int64."""
    return _choose(members, bounds, documents, priority)


def split_pairs(codes: np.ndarray) -> np.ndarray:
    """Pairs as int64 [P, 2]."""
    return np.stack([codes >> np.uint64(32), codes & np.uint64(0xFFFFFFFF)], axis=1).astype(
        np.int64
    )


@kernel
def _group(keys, table, counts):
    mask = np.uint64(len(table) - 1)
    slots = np.empty(len(keys), np.int64)
    for i in range(len(keys)):
        slot = (keys[i] ^ (keys[i] >> np.uint64(32))) & mask
        while counts[slot] > 0 and table[slot] != keys[i]:
            slot = (slot + np.uint64(1)) & mask
        table[slot] = keys[i]
        counts[slot] += 1
        slots[i] = slot
    groups, total = 0, 0
    for slot in range(len(table)):
        if counts[slot] > 1:
            groups += 1
            total += counts[slot]
    bounds = np.zeros(groups + 1, np.int64)
    places = np.full(len(table), -1, np.int64)
    at, number = 0, 0
    # Groups are numbered as their first members come, whatever the size of the table.
    for i in range(len(keys)):
        slot = slots[i]
        if counts[slot] > 1 and places[slot] < 0:
            places[slot] = at
            at += counts[slot]
            number += 1
            bounds[number] = at
    members = np.empty(total, np.int64)
    for i in range(len(keys)):
        slot = slots[i]
        if counts[slot] > 1:
            members[places[slot]] = i
            places[slot] += 1
    return members, bounds


@kernel
def _count_pairs(bounds, large, centres):
    total = 0
    for g in range(len(bounds) - 1):
        size = bounds[g + 1] - bounds[g]
        total += size * (size - 1) // 2 if size <= large else size * centres
    return total


@kernel
def _pair(members, bounds, documents, priority, settled, large, centres, codes):
    used = 0
    best = np.empty(max(1, centres), np.int64)
    for g in range(len(bounds) - 1):
        start, stop = bounds[g], bounds[g + 1]
        if stop - start <= large:
            for i in range(start, stop):
                for j in range(i + 1, stop):
                    used = _emit(documents[members[i]], documents[members[j]], settled, codes, used)
            continue
        found = 0
        for i in range(start, stop):
            found = _insert(members[i], documents, priority, best, found)
        for i in range(start, stop):
            for c in range(found):
                used = _emit(documents[members[i]], documents[best[c]], settled, codes, used)
    return used


@kernel
def _emit(one, two, settled, codes, used):
    if one == two or (one < settled and two < settled):
        return used
    low, high = min(one, two), max(one, two)
    codes[used] = (np.uint64(low) << np.uint64(32)) | np.uint64(high)
    return used + 1


@kernel
def _precedes(one, two, documents, priority):
    """Whether position `one` is preferred to `two`."""
    if priority[one] != priority[two]:
        return priority[one] > priority[two]
    return documents[one] < documents[two]


@kernel
def _insert(position, documents, priority, best, found):
    """Keep `best` the preferred positions, in order; returns how many there are."""
    at = found
    while at > 0 and _precedes(position, best[at - 1], documents, priority):
        at -= 1
    if at == len(best):
        return found
    last = min(found, len(best) - 1)
    for k in range(last, at, -1):
        best[k] = best[k - 1]
    best[at] = position
    return min(found + 1, len(best))


@kernel
def _choose(members, bounds, documents, priority):
    chosen = np.empty(len(bounds) - 1, np.int64)
    for g in range(len(bounds) - 1):
        best = members[bounds[g]]
        for i in range(bounds[g] + 1, bounds[g + 1]):
            if _precedes(members[i], best, documents, priority):
                best = members[i]
        chosen[g] = best
    return chosen
