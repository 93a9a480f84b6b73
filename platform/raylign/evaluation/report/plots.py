"""Charts as inline SVG: text stays text, and colours are CSS variables, so both schemes fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from raylign.evaluation.report.document import Chart, Gantt, Lane, Series
from raylign.evaluation.report.figures import MINUS, show_percent, show_seconds, show_unit
from raylign.evaluation.report.markup import color, element, plain, text
from raylign.evaluation.report.timeline import ACTIVITIES, TROUBLE

HOVER_POINTS = 80
LINE_POINTS = 600
LEFT, RIGHT, TOP, BOTTOM = 60.0, 12.0, 12.0, 36.0

LANE_HEIGHT, LANE_GAP, LANES_TOP = 26.0, 10.0, 22.0
LABEL_WIDTH, WINDOW_WIDTH, GAP_WIDTH, SHARE_WIDTH, BUSY_WIDTH = 96.0, 770.0, 24.0, 150.0, 44.0
SHARE_LEFT = LABEL_WIDTH + WINDOW_WIDTH + GAP_WIDTH
GANTT_WIDTH = SHARE_LEFT + SHARE_WIDTH + BUSY_WIDTH

Points = Sequence[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]


def draw_chart(chart: Chart) -> str:
    """A line chart; empty where there is nothing that can be drawn."""
    width, height = (520.0, 270.0) if chart.wide else (360.0, 210.0)
    lines = [(series, _thin(series, chart.log)) for series in chart.series]
    points = [point for _, line in lines for point in line]
    if not points:
        return ""
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    ticks = _choose_y_ticks(chart, [y for _, y in points])
    low_y, high_y = (_scale(tick, chart.log) for tick in (ticks[0], ticks[-1]))

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - low_x) / ((high_x - low_x) or 1.0)
        down = (high_y - _scale(y, chart.log)) / ((high_y - low_y) or 1.0)
        return LEFT + right * (width - LEFT - RIGHT), TOP + down * (height - TOP - BOTTOM)

    parts = [
        *_draw_y_axis(chart, ticks, low_x, width, place),
        *_draw_x_axis(chart, (low_x, high_x), ticks[0], (width, height), place),
        *_draw_guide(chart, low_x, width, place),
        *(_draw_series(series, line, chart, place) for series, line in lines if line),
    ]
    box = {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria_label": chart.title}
    return element("svg", *parts, **box)


def _thin(series: Series, log: bool) -> list[tuple[float, float]]:
    """Points that can be drawn, no more of them than a screen can show."""
    points = [p for p in series.points if math.isfinite(p[1]) and (p[1] > 0 or not log)]
    stride = math.ceil(len(points) / LINE_POINTS) or 1
    return points[::stride] + (points[-1:] if stride > 1 else [])


def _scale(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def _choose_y_ticks(chart: Chart, values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    if chart.guide is not None:
        low, high = min(low, chart.guide[0]), max(high, chart.guide[0])
    if chart.log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9)
        last = max(last, first + 1)
        stride = math.ceil((last - first) / 6)
        return [10.0**power for power in range(first, last + stride, stride)]
    if chart.floor is not None:
        low = min(low, chart.floor)
        high = high if high > low else low + 1.0
    return choose_ticks(low, high)


def choose_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that enclose [low, high]."""
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-12):
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    size = 10.0 ** math.floor(math.log10((high - low) / count))
    choices = []
    for factor in (0.5, 1, 2, 2.5, 5, 10):
        step = factor * size
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        waste = (last - first) * step / (high - low) - 1
        # As little empty axis as a readable number of ticks allows.
        choices.append((waste + 0.08 * abs(last - first + 1 - count), step, first, last))
    _, step, first, last = min(choices)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _draw_y_axis(
    chart: Chart, ticks: list[float], low_x: float, width: float, place: Place
) -> list[str]:
    parts = []
    for tick in ticks:
        _, y = place(low_x, tick)
        parts.append(element("line", class_="grid", x1=LEFT, x2=width - RIGHT, y1=y, y2=y))
        place_label = {"x": LEFT - 8, "y": y + 3.5, "text_anchor": "end"}
        label = _label_power(tick) if chart.log else plain(_label_tick(tick, ticks, chart))
        parts.append(element("text", label, class_="tick", **place_label))
    return parts


def _draw_x_axis(
    chart: Chart,
    span: tuple[float, float],
    low_y: float,
    size: tuple[float, float],
    place: Place,
) -> list[str]:
    width, height = size
    ticks = [t for t in choose_ticks(*span, 6) if span[0] <= t <= span[1] and t == int(t)]
    parts = []
    for tick in ticks or [span[0]]:
        x, _ = place(tick, low_y)
        spot = {"x": x, "y": height - BOTTOM + 15, "text_anchor": "middle"}
        parts.append(text("text", f"{tick:,.0f}", class_="tick", **spot))
    middle = {"x": (LEFT + width - RIGHT) / 2, "y": height - 4, "text_anchor": "middle"}
    parts.append(text("text", chart.x_label, class_="axis", **middle))
    return parts


def _draw_guide(chart: Chart, low_x: float, width: float, place: Place) -> list[str]:
    if chart.guide is None:
        return []
    value, label = chart.guide
    _, y = place(low_x, value)
    spot = {"x": width - RIGHT, "y": y - 5, "text_anchor": "end"}
    return [
        element("line", class_="guide", x1=LEFT, x2=width - RIGHT, y1=y, y2=y),
        text("text", label, class_="guide-label", **spot),
    ]


def _label_power(tick: float) -> str:
    power = str(round(math.log10(tick))).replace("-", MINUS)
    return "10" + text("tspan", power, class_="power", dy=-4)


def _label_tick(tick: float, ticks: Sequence[float], chart: Chart) -> str:
    step = ticks[1] - ticks[0]
    if chart.unit == "percent":
        tick, step = tick * 100, step * 100
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if digits > 4:
        return show_unit(tick, "number")
    # 2.5 and 0.25 need one digit more than their power of ten tells.
    if not math.isclose(step * 10**digits, round(step * 10**digits)):
        digits += 1
    return f"{tick:,.{digits}f}".replace("-", MINUS) + ("%" if chart.unit == "percent" else "")


def _draw_series(series: Series, line: Points, chart: Chart, place: Place) -> str:
    spots = [place(x, y) for x, y in line]
    path = " ".join(f"{round(x, 1):g},{round(y, 1):g}" for x, y in spots)
    stroke = f"stroke:{color(series.color)}"
    drawn = element(
        "polyline", class_="faint" if series.faint else "line", style=stroke, points=path
    )
    if series.faint:
        return drawn
    marked = spots if series.dots else spots[-1:]
    fill = f"fill:{color(series.color)}"
    parts = [drawn, *(element("circle", style=fill, r=3, cx=x, cy=y) for x, y in marked)]
    stride = math.ceil(len(line) / HOVER_POINTS)
    for (x, y), (step, value) in list(zip(spots, line, strict=True))[::stride]:
        label = f"{series.name}, {chart.x_label} {step:,.0f}: {show_unit(value, chart.unit)}"
        parts.append(element("circle", text("title", label), class_="hit", r=6, cx=x, cy=y))
    return "".join(parts)


def draw_gantt(gantt: Gantt) -> str:
    """Lanes over a window of time, and on the right what each did over the whole run."""
    bottom = LANES_TOP + len(gantt.lanes) * (LANE_HEIGHT + LANE_GAP)
    scale = WINDOW_WIDTH / (gantt.seconds or 1.0)
    window = f"{show_seconds(gantt.seconds)} window"
    parts = [
        HATCH,
        text("text", window, class_="axis", x=LABEL_WIDTH, y=11),
        text("text", "whole run", class_="axis", x=SHARE_LEFT, y=11),
        text("text", "busy", class_="axis", x=GANTT_WIDTH, y=11, text_anchor="end"),
    ]
    for tick in choose_ticks(0.0, gantt.seconds, 9):
        if tick > gantt.seconds:
            continue
        x = LABEL_WIDTH + tick * scale
        parts.append(element("line", class_="grid", x1=x, x2=x, y1=20, y2=bottom))
        spot = {"x": x, "y": bottom + 14, "text_anchor": "middle"}
        parts.append(text("text", f"{tick:g} s", class_="tick", **spot))
    for row, lane in enumerate(gantt.lanes):
        y = LANES_TOP + row * (LANE_HEIGHT + LANE_GAP)
        parts.extend([*_draw_window(lane, y, scale), *_draw_shares(lane, y)])
    box = {"viewBox": f"0 0 {GANTT_WIDTH:g} {bottom + 22:g}", "role": "img"}
    return element("svg", *parts, class_="gantt", aria_label=gantt.title, **box)


HATCH = element(
    "defs",
    element(
        "pattern",
        element("rect", width=6, height=6, class_="hatch-back"),
        element("line", x1=0, y1=0, x2=0, y2=6, class_="hatch-line"),
        id="hatch",
        width=6,
        height=6,
        **{"patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"},
    ),
)


def _draw_window(lane: Lane, y: float, scale: float) -> list[str]:
    """An actor's name and its activities in the window."""
    middle = y + LANE_HEIGHT / 2 + 4
    spot = {"x": LABEL_WIDTH - 12, "y": middle, "text_anchor": "end"}
    parts = [
        text("text", lane.actor, class_="actor", **spot),
        element("rect", class_="lane", x=LABEL_WIDTH, y=y, width=WINDOW_WIDTH, height=LANE_HEIGHT),
    ]
    # What an actor is shown doing first when it does two things at once is drawn last, on top.
    rank = {what: i for i, what in enumerate(reversed(ACTIVITIES))}
    marks: list[str] = []
    for span in sorted(lane.spans, key=lambda s: (rank.get(s.what, -1), s.start)):
        x, width = LABEL_WIDTH + span.start * scale, max((span.end - span.start) * scale, 0.8)
        step = "" if span.step is None else f", step {span.step}"
        if span.what not in ACTIVITIES and span.end == span.start:
            kind = "mark trouble" if span.what in TROUBLE else "mark"
            marks.append(_draw_mark(f"{span.what}{step}", kind, x, y))
            continue
        title = f"{span.what}{step}: {show_seconds(span.end - span.start)}"
        parts.append(_draw_block(span.what, title, x, y, width))
        if span.what == "learn" and span.step is not None and width > 52:
            spot = {"x": x + width / 2, "y": middle, "text_anchor": "middle"}
            parts.append(text("text", f"step {span.step}", class_="on", **spot))
    return parts + marks


def _draw_shares(lane: Lane, y: float) -> list[str]:
    """What an actor did over the whole run, and how much of it was work."""
    x = SHARE_LEFT
    parts = [element("rect", class_="lane", x=x, y=y, width=SHARE_WIDTH, height=LANE_HEIGHT)]
    for what in ACTIVITIES:
        width = lane.shares.get(what, 0.0) * SHARE_WIDTH
        if width:
            title = f"{what}: {show_percent(lane.shares[what])} of the whole run"
            parts.append(_draw_block(what, title, x, y, width))
            x += width
    busy = sum(share for what, share in lane.shares.items() if what != "wait")
    spot = {"x": GANTT_WIDTH, "y": y + LANE_HEIGHT / 2 + 4, "text_anchor": "end"}
    return [*parts, text("text", show_percent(busy, 0), class_="busy", **spot)]


def _draw_block(what: str, title: str, x: float, y: float, width: float) -> str:
    known = color(what) if what in ACTIVITIES else color("muted")
    fill = "url(#hatch)" if what == "wait" else known
    size = {"x": x, "y": y, "width": width, "height": LANE_HEIGHT, "rx": 2}
    return element("rect", text("title", title), style=f"fill:{fill}", **size)


def _draw_mark(title: str, kind: str, x: float, y: float) -> str:
    """A moment at which something befell an actor."""
    tip = f"{x - 5:.1f},{y - 5:.1f} {x + 5:.1f},{y - 5:.1f} {x:.1f},{y + 3:.1f}"
    line = element("line", x1=x, x2=x, y1=y, y2=y + LANE_HEIGHT)
    return element("g", text("title", title), line, element("polygon", points=tip), class_=kind)
