"""Histograms as inline SVG: bars of equal width over edges of any kind, thresholds as lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from raylign.evaluation.report.figures import show_count, show_number, show_percent
from raylign.evaluation.report.markup import color, element, plain, text

WIDTH, HEIGHT = 360.0, 200.0
LEFT, RIGHT, TOP, BOTTOM = 12.0, 12.0, 28.0, 34.0
TICKS = 6


@dataclass(frozen=True, slots=True)
class Mark:
    """A threshold and what it says."""

    value: float
    label: str


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
    spot = {"x": LEFT, "y": TOP - 14, "text_anchor": "start"}
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
    bars = len(histogram.counts)
    stride = max(1, math.ceil(bars / TICKS))
    shift = each / 2 if histogram.whole else 0.0
    parts = []
    for number in range(0, bars + (0 if histogram.whole else 1), stride):
        x = LEFT + number * each + shift
        label = show_edge(histogram.edges[number])
        anchor = "start" if number == 0 and not histogram.whole else "middle"
        spot = {"x": x, "y": HEIGHT - BOTTOM + 15, "text_anchor": anchor}
        parts.append(text("text", label, class_="tick", **spot))
    middle = {"x": WIDTH / 2, "y": HEIGHT - 4, "text_anchor": "middle"}
    parts.append(text("text", histogram.x_label, class_="axis", **middle))
    return parts


def _draw_marks(histogram: Histogram, each: float) -> list[str]:
    """Thresholds where they fall among the edges; labels point away from the middle."""
    parts = []
    for number, mark in enumerate(histogram.marks):
        x = LEFT + _locate(histogram.edges, mark.value, histogram.whole) * each
        near_right = x > WIDTH * 0.6
        spot = {"x": x - 4 if near_right else x + 4, "y": TOP + 8 + 13 * number}
        anchor = "end" if near_right else "start"
        parts.append(element("line", class_="guide", x1=x, x2=x, y1=TOP - 8, y2=HEIGHT - BOTTOM))
        parts.append(text("text", mark.label, class_="guide-label", text_anchor=anchor, **spot))
    return parts


def _locate(edges: Sequence[float], value: float, whole: bool) -> float:
    """Position of a value on the axis, in bars; a whole number is in the middle of its bar."""
    if value <= edges[0]:
        return 0.0
    for number in range(len(edges) - 1):
        if value < edges[number + 1]:
            return number + (value - edges[number]) / (edges[number + 1] - edges[number])
    return float(len(edges) - 1)
