"""Who computes what of a batch: rows go to ranks, groups to minibatches, and micro-batches.

A pass over the batch is cut into minibatches, one optimizer step each, that share out its groups;
groups stay whole. A row stays on one rank for all passes, where it is scored once. All of it is a
function of (lengths, groups, seed, version): of nothing that happens at run time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raylign.records import split_by_tokens
from raylign.runtime import derive_seed

MicroBatches = tuple[tuple[int, ...], ...]
"""Rows of each micro-batch, counted in the batch; empty for a rank that has nothing to add."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a batch is cut."""

    ranks: int
    budget: int
    """Padded tokens of a micro-batch."""
    passes: int = 1
    minibatches: int = 1
    """Optimizer steps a pass; fewer where there are fewer groups."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a step."""

    rows: tuple[int, ...]
    """That it holds, ascending."""
    scoring: MicroBatches
    """All of them, for what is computed before the first optimizer step."""
    updates: tuple[MicroBatches, ...]
    """Of each optimizer step; every rank has as many micro-batches in it."""
    members: tuple[tuple[int, ...], ...]
    """All rows of each optimizer step, this rank's and the others'."""


def share_out(
    lengths: Sequence[int],
    groups: Sequence[int],
    cut: Cut,
    version: int,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> list[Share]:
    """Every rank's share of a batch of rows with these lengths and group numbers.

    `pairs`: rows that must meet in one micro-batch; rows in none of them are left out. Each unit (a
    row, or a pair) goes to the rank with the fewest tokens so far, longest first, and with several
    minibatches to one with the fewest of its group: any choice of groups is then balanced.
    """
    if pairs is None:
        units: list[tuple[int, ...]] = [(row,) for row in range(len(lengths))]
    else:
        units = [tuple(pair) for pair in pairs]
    widths = [max(lengths[row] for row in unit) for unit in units]
    owners = _deal(units, widths, groups, cut)
    by_group: dict[int, list[int]] = defaultdict(list)
    for index, unit in enumerate(units):
        by_group[groups[unit[0]]].append(index)
    everything = list(range(len(units)))
    chosen = _choose(by_group, cut, version)

    def plan(wanted: Sequence[int]) -> list[MicroBatches]:
        return _split(wanted, owners, units, widths, cut)

    scoring, steps = plan(everything), [plan(wanted) for wanted in chosen]
    members = tuple(tuple(sorted(row for i in wanted for row in units[i])) for wanted in chosen)
    return [
        Share(
            rows=tuple(sorted(row for micro in scoring[rank] for row in micro)),
            scoring=scoring[rank],
            updates=tuple(step[rank] for step in steps),
            members=members,
        )
        for rank in range(cut.ranks)
    ]


def _deal(
    units: Sequence[tuple[int, ...]], widths: Sequence[int], groups: Sequence[int], cut: Cut
) -> list[int]:
    """The rank of each unit."""
    load = [0] * cut.ranks
    held: dict[int, list[int]] = defaultdict(lambda: [0] * cut.ranks)
    owners = [0] * len(units)
    for index in sorted(range(len(units)), key=lambda i: (-widths[i], i)):
        own = held[groups[units[index][0]]]
        even = cut.minibatches > 1
        rank = min(range(cut.ranks), key=lambda r: (own[r] if even else 0, load[r], r))
        owners[index] = rank
        own[rank] += 1
        load[rank] += widths[index] * len(units[index])
    return owners


def _choose(by_group: Mapping[int, Sequence[int]], cut: Cut, version: int) -> list[list[int]]:
    """Units of each optimizer step; groups are drawn anew in every pass."""
    names = sorted(by_group)
    if not names:
        return []  # pairs, and every group ties
    count = min(cut.minibatches, len(names))
    chosen = []
    for number in range(cut.passes):
        order = list(range(len(names)))
        if count > 1:
            stream = np.random.default_rng(derive_seed(cut.seed, "minibatches", version, number))
            order = stream.permutation(len(names)).tolist()
        for part in np.array_split(order, count):
            chosen.append(sorted(unit for i in part.tolist() for unit in by_group[names[i]]))
    return chosen


def _split(
    wanted: Sequence[int],
    owners: Sequence[int],
    units: Sequence[tuple[int, ...]],
    widths: Sequence[int],
    cut: Cut,
) -> list[MicroBatches]:
    """Each rank's micro-batches of the wanted units, equally many."""
    plans = []
    for rank in range(cut.ranks):
        own = [index for index in wanted if owners[index] == rank]
        size = len(units[own[0]]) if own else 1
        parts = split_by_tokens([widths[index] for index in own], max(1, cut.budget // size))
        plans.append([tuple(row for i in part for row in units[own[i]]) for part in parts])
    most = max(1, *(len(plan) for plan in plans))
    return [(*plan, *[()] * (most - len(plan))) for plan in plans]
