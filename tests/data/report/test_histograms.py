"""Histograms and thresholds against counting one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from raylign.data.report.histograms import bin_values, find_cuts
from raylign.data.report.plots import choose_edges, show_edge

RNG = np.random.default_rng(0)
SHAPES = {
    "shares": (RNG.random(500), False, [0.3]),
    "mostly zero": (np.where(RNG.random(500) < 0.9, 0, RNG.random(500)), False, [0.0, 0.6]),
    "a long tail": (RNG.exponential(1, 500) ** 4, False, [2.0, 1e6]),
    "few whole numbers": (RNG.integers(0, 9, 500), True, [2.0]),
    "many whole numbers": (RNG.integers(0, 1_000_000, 500), True, [40.0, 1e5]),
    "whole numbers from 1": (RNG.integers(1, 5000, 500), True, []),
    "one value": (np.full(9, 3.5), False, []),
    "nothing but zero": (np.zeros(9), True, [0.0]),
    "negative": (RNG.normal(size=500), False, [0.5]),
    "one document": (np.array([7.0]), True, [1e6]),
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_bars_count_what_lies_between_their_edges(shape: str) -> None:
    values, whole, marks = SHAPES[shape]
    values = values.astype(np.float32)
    kept = RNG.random(len(values)) < 0.5
    found = bin_values(values, kept, marks, whole)
    edges, counts = found["edges"], found["counts"]
    assert len(counts) == len(edges) - 1 <= 64
    assert all(low < high for low, high in itertools.pairwise(edges))
    assert all(edges[0] <= mark <= edges[-1] for mark in marks)
    assert sum(counts) + found["zeros"] == len(values)
    assert found["zeros"] in (0, int((values == 0).sum()))
    drawn = values != 0 if found["zeros"] else np.ones(len(values), bool)
    assert sum(found["kept"]) == int((kept & drawn).sum())
    assert all(stay <= count for stay, count in zip(found["kept"], counts, strict=True))
    assert found["above"] == bool((values > edges[-1]).any())
    # Edges are rounded to six digits, so values right at one may fall on either side.
    width = (edges[-1] - edges[0]) * 1e-5
    for (low, high), count in list(zip(itertools.pairwise(edges), counts, strict=True))[:-1]:
        inside = drawn & (values >= low + width) & (values < high - width)
        around = drawn & (values >= low - width) & (values < high + width)
        assert inside.sum() <= count <= around.sum()


def test_without_fates_nothing_is_said_of_them() -> None:
    assert bin_values(np.arange(5.0), None, [], True)["kept"] is None


@pytest.mark.parametrize("least", [True, False])
@pytest.mark.parametrize("distinct", [3, 1000])
def test_cuts_reject_as_much_as_they_may_and_no_more(least: bool, distinct: int) -> None:
    rng = np.random.default_rng(distinct)
    for size in (1, 2, 17, 100):
        values = rng.integers(0, distinct, size).astype(np.float32)
        shares = (0.01, 0.1, 0.5)
        for share, cut in zip(shares, find_cuts(values, shares, least), strict=True):

            def rejected(threshold: float, values: np.ndarray = values) -> float:
                return float((values < threshold if least else values > threshold).mean())

            assert rejected(cut) <= share
            stricter = [v for v in values if (v > cut if least else v < cut)]
            assert all(rejected(v) > share for v in stricter)


def test_ticks_are_round_and_on_the_axis() -> None:
    assert choose_edges([0.0, 0.1, 0.2, 0.3], False)[0] == 0
    assert choose_edges([float(n) for n in range(16)], True) == [0, 3, 6, 9, 12]
    assert choose_edges([2.0**n for n in range(3, 18)], False) == [10, 100, 1000, 10000, 100000]
    assert choose_edges([0.0, *(2.0**n for n in range(7))], False) == [0, 5, 10, 50]
    for edges in ([0.0, 0.011, 0.022], [0.2, 0.6, 1.0]):
        ticks = choose_edges(edges, False)
        assert len(ticks) >= 2 and all(edges[0] <= tick <= edges[-1] for tick in ticks)


def test_numbers_on_axes() -> None:
    assert [show_edge(v) for v in (0, 0.25, 40, 1500, 23170.5, 1e5, 2.5e6)] == [
        *("0", "0.25", "40", "1,500", "23.2k", "100k", "2.5M")
    ]
