"""Histograms as inline SVG: bars of equal width over edges of any kind, thresholds as lines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from raylign.evaluation.report.figures import show_count, show_number, show_percent
from raylign.evaluation.report.markup import color, element, plain, text
from raylign.evaluation.report.plots import choose_ticks

WIDTH, HEIGHT = 360.0, 212.0
LEFT, RIGHT, TOP, BOTTOM = 12.0, 12.0, 46.0, 34.0
"""There is room above the bars for one line of text, and for two thresholds."""
TICKS = 6


@dataclass(frozen=True, slots=True)
class Mark:
    """A threshold and what it says."""

    value: float
    label: str
    least: bool = False
    """It passes itself and what is larger."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Documents by a number: `counts` [B] between `edges` [B + 1]."""

    title: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    kept: tuple[int, ...] | None
    """Those of them that stayed; None when that is not known."""
    meaning: str
    marks: tuple[Mark, ...] = ()
    x_label: str = ""
    above: bool = False
    """The last bar holds all that is larger, too."""
    whole: bool = False
    """A bar is the number at its lower edge."""
    color: str = "rl"
    unit: str = "documents"


def draw_histogram(histogram: Histogram) -> str:
    """The plot with title, key and meaning."""
    names = [("kept", histogram.color), ("dropped", "bad")] if histogram.kept else []
    keys = [
        element("span", plain(name), class_="key", style=f"--c:{color(hue)}") for name, hue in names
    ]
    title = text("h3", histogram.title)
    return element(
        "figure",
        element("figcaption", title, element("p", *keys, class_="keys") if keys else ""),
        _draw_bars(histogram),
        text("p", histogram.meaning, class_="meaning"),
        class_="chart",
    )


def _draw_bars(histogram: Histogram) -> str:
    highest = max(histogram.counts, default=0) or 1
    each = (WIDTH - LEFT - RIGHT) / max(1, len(histogram.counts))
    floor = HEIGHT - BOTTOM
    total = sum(histogram.counts) or 1
    parts = [element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=floor, y2=floor)]
    for number, count in enumerate(histogram.counts):
        if not count:
            continue
        kept = count if histogram.kept is None else histogram.kept[number]
        x, width = LEFT + number * each, max(each - (1.0 if each > 4 else 0.0), 0.8)
        tall = (floor - TOP) * count / highest
        low = (floor - TOP) * kept / highest
        # A bar that stands for anything is seen.
        tall = max(tall, 1.2)
        pieces = [text("title", _name_bar(histogram, number, count, kept, total))]
        if low > 0:
            pieces.append(
                _draw_piece(x, floor - min(low, tall), width, min(low, tall), histogram.color)
            )
        if count > kept:
            pieces.append(_draw_piece(x, floor - tall, width, max(tall - low, 0.8), "bad"))
        parts.append(element("g", *pieces))
    peak = show_count(highest)
    spot = {"x": LEFT, "y": 11.0, "text_anchor": "start"}
    parts.append(text("text", f"tallest bar: {peak} ({show_percent(highest / total)})", **spot))
    parts += [*_draw_ticks(histogram, each), *_draw_marks(histogram, each)]
    box = {"viewBox": f"0 0 {WIDTH:g} {HEIGHT:g}", "role": "img"}
    return element("svg", *parts, aria_label=histogram.title, **box)


def _draw_piece(x: float, y: float, width: float, height: float, hue: str) -> str:
    size = {"x": x, "y": y, "width": width, "height": height}
    return element("rect", style=f"fill:{color(hue)}", **size)


def _name_bar(histogram: Histogram, number: int, count: int, kept: int, total: int) -> str:
    low, high = histogram.edges[number], histogram.edges[number + 1]
    name = show_edge(low) if histogram.whole else f"{show_edge(low)} to {show_edge(high)}"
    if histogram.above and number == len(histogram.counts) - 1:
        name = f"{show_edge(low)} and more"
    shown = f"{name}: {count:,} {histogram.unit} ({show_percent(count / total)})"
    return shown if histogram.kept is None else f"{shown}, {kept:,} kept"


def show_edge(value: float) -> str:
    """A number on an axis: short, and the same digits as a person would write."""
    if value == 0:
        return "0"
    if abs(value) >= 1e4:
        for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= limit:
                return f"{show_number(value / limit)}{letter}"
    if abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return show_number(value)


def _draw_ticks(histogram: Histogram, each: float) -> list[str]:
    parts = []
    for tick in choose_edges(histogram.edges, histogram.whole):
        at = _locate(histogram.edges, tick, histogram.whole)
        x = LEFT + at * each
        anchor = "start" if at == 0 else "end" if at == len(histogram.counts) else "middle"
        spot = {"x": x, "y": HEIGHT - BOTTOM + 15, "text_anchor": anchor}
        parts.append(text("text", show_edge(tick), class_="tick", **spot))
    middle = {"x": WIDTH / 2, "y": HEIGHT - 4, "text_anchor": "middle"}
    parts.append(text("text", histogram.x_label, class_="axis", **middle))
    return parts


def choose_edges(edges: Sequence[float], whole: bool) -> list[float]:
    """About six round numbers on an axis between `edges`, linear or not."""
    bars = len(edges) - 1
    if whole:
        stride = max(1, math.ceil(bars / TICKS))
        return list(edges[:bars:stride])
    sizes = [high - low for low, high in itertools.pairwise(edges)]
    if max(sizes) < 1.01 * min(sizes):
        return [t for t in choose_ticks(edges[0], edges[-1], TICKS) if edges[0] <= t <= edges[-1]]
    powers = [10.0**n for n in range(13) if edges[0] <= 10.0**n <= edges[-1]]
    if len(powers) < 3:
        powers = sorted({*powers, *(5 * power for power in powers if 5 * power <= edges[-1])})
    return [0.0, *(power for power in powers if power > 1)] if edges[0] == 0 else powers


def _draw_marks(histogram: Histogram, each: float) -> list[str]:
    """Thresholds where they fall among the edges; labels point away from the middle."""
    parts = []
    for number, mark in enumerate(histogram.marks):
        # Between the bars of whole numbers that it tells apart.
        shift = 0.0 if not histogram.whole else -0.5 if mark.least else 0.5
        x = LEFT + (_locate(histogram.edges, mark.value, histogram.whole) + shift) * each
        near_right = x > WIDTH * 0.6
        spot = {"x": x - 4 if near_right else x + 4, "y": 25.0 + 13 * (number % 2)}
        anchor = "end" if near_right else "start"
        parts.append(element("line", class_="guide", x1=x, x2=x, y1=16.0, y2=HEIGHT - BOTTOM))
        parts.append(text("text", mark.label, class_="guide-label", text_anchor=anchor, **spot))
    return parts


def _locate(edges: Sequence[float], value: float, whole: bool) -> float:
    """Position of a value on the axis, in bars; a whole number is in the middle of its bar."""
    if value < edges[0]:
        return 0.0
    for number in range(len(edges) - 1):
        if value < edges[number + 1]:
            if whole:
                return number + 0.5
            return number + (value - edges[number]) / (edges[number + 1] - edges[number])
    return float(len(edges) - 1)
