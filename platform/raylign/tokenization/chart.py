"""Vocabulary size against compression, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raylign.evaluation.report.markup import color, element, text
from raylign.evaluation.report.plots import choose_ticks

WIDTH, HEIGHT = 540.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 24.0, 14.0, 42.0
TICKS_AT_MOST = 7


@dataclass(frozen=True, slots=True)
class Line:
    """One tokenizer: where it stands, and what the same kind does at other sizes."""

    name: str
    color: str
    size: int
    bytes_per_token: float
    curve: tuple[tuple[int, float], ...] = ()
    lossy: bool = False
    """It has unknown tokens, so that its numbers flatter it: drawn hollow and dashed."""


def draw_compression(lines: Sequence[Line]) -> str:
    """Sizes on a logarithmic axis; a dot is a tokenizer, a line its kind; empty without lines."""
    if not lines:
        return ""
    sizes = [size for line in lines for size in (line.size, *(s for s, _ in line.curve))]
    values = [v for line in lines for v in (line.bytes_per_token, *(v for _, v in line.curve))]
    low, high = math.log2(min(sizes)), math.log2(max(sizes))
    margin = 0.04 * (high - low) or 0.5
    low, high = low - margin, high + margin
    ticks = choose_ticks(min(0.9, *values), max(values))

    def place(size: float, value: float) -> tuple[float, float]:
        right = (math.log2(size) - low) / (high - low)
        up = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        _, y = place(1, tick)
        parts.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        spot = {"x": LEFT - 8, "y": y + 3.5, "text_anchor": "end"}
        parts.append(text("text", f"{tick:g}", class_="tick", **spot))
    for power in _choose_powers(low, high):
        x, _ = place(2**power, ticks[0])
        foot = {"x1": x, "x2": x, "y1": HEIGHT - BOTTOM, "y2": HEIGHT - BOTTOM + 4}
        parts.append(element("line", class_="grid", **foot))
        spot = {"x": x, "y": HEIGHT - BOTTOM + 17, "text_anchor": "middle"}
        parts.append(text("text", f"{2**power:,}", class_="tick", **spot))
    middle = {"x": (LEFT + WIDTH - RIGHT) / 2, "y": HEIGHT - 5, "text_anchor": "middle"}
    parts.append(text("text", "entries in the vocabulary", class_="axis", **middle))
    parts += [_draw_line(line, place) for line in lines]
    box = {"viewBox": f"0 0 {WIDTH:g} {HEIGHT:g}", "role": "img"}
    return element("svg", *parts, aria_label="Bytes per token by vocabulary size", **box)


def _choose_powers(low: float, high: float) -> list[int]:
    """Powers of two inside the axis, no more than there is room for."""
    powers = list(range(math.ceil(low), math.floor(high) + 1))
    return powers[:: math.ceil(len(powers) / TICKS_AT_MOST) or 1]


def _draw_line(line: Line, place: Callable[[float, float], tuple[float, float]]) -> str:
    stroke = f"stroke:{color(line.color)}"
    fill = f"fill:{color(line.color)}"
    if line.lossy:
        fill = f"fill:{color('panel')};stroke-width:2;{stroke}"
        stroke += ";stroke-dasharray:4 4"
    parts = []
    if line.curve:
        spots = [place(*point) for point in line.curve]
        points = " ".join(f"{round(x, 1):g},{round(y, 1):g}" for x, y in spots)
        parts.append(element("polyline", class_="line", style=stroke, points=points))
    for size, value, radius in (
        *((size, value, 3.0) for size, value in line.curve),
        (line.size, line.bytes_per_token, 5.5),
    ):
        x, y = place(size, value)
        label = text("title", f"{line.name}, {size:,} entries: {value:.2f} bytes a token")
        parts.append(element("circle", label, style=fill, r=radius, cx=x, cy=y))
    return "".join(parts)
