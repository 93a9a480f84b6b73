"""A document as Markdown: the same content, with sparklines in place of plots."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from raylign.evaluation.report.document import (
    Bars,
    Cell,
    Chart,
    Charts,
    Code,
    Document,
    Exchanges,
    Facts,
    Folded,
    Gantt,
    Hero,
    Journey,
    Quotes,
    Section,
    Table,
    Text,
    Viewer,
)
from raylign.evaluation.report.figures import (
    show_model,
    show_percent,
    show_points,
    show_seconds,
    show_unit,
)
from raylign.evaluation.report.timeline import ACTIVITIES

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 32
BAR_WIDTH = 24


def render_markdown(document: Document) -> str:
    """The whole report."""
    parts = [_render_hero(document.hero), *map(_render_section, document.sections)]
    parts.extend(f"*{_escape(note)}*" for note in document.notes)
    return "\n\n".join(parts) + "\n"


def draw_spark(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """A line of blocks: `values` averaged into `width` buckets, scaled from their least to most."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return BLOCKS[0] * count
    return "".join(BLOCKS[min(7, int((m - low) / (high - low) * 8))] for m in means)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    for mark, shown in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "\\|"),
        ("*", "\\*"),
        ("`", "\\`"),
    ):
        text = text.replace(mark, shown)
    return " ".join(text.split())


def _fence(text: str) -> str:
    """A code block whose fence is longer than any run of backquotes inside."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _tabulate(
    head: Sequence[str], rows: Sequence[Sequence[str]], numeric: frozenset[int] = frozenset()
) -> str:
    rule = ["---:" if i in numeric else "---" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _render_hero(hero: Hero) -> str:
    parts = [f"# {_escape(hero.title)}", _escape(hero.eyebrow), _escape(hero.lead)]
    if hero.scores:
        rows = [
            (
                _escape(show_model(s.model)),
                show_percent(s.value),
                "" if s.stderr is None else f"± {100 * s.stderr:.1f}",
                "" if s.gain is None else show_points(s.gain),
            )
            for s in hero.scores
        ]
        head = ("Model", _escape(hero.score_label), "Standard error", "Points gained")
        parts.append(_tabulate(head, rows, frozenset({1, 2, 3})))
    if hero.facts:
        parts.append(_render_facts(Facts(hero.facts)))
    return "\n\n".join(parts)


def _render_section(section: Section) -> str:
    parts = [f"## {_escape(section.title)}", _escape(section.lead)]
    return "\n\n".join(parts + [_render(block) for block in section.blocks])


def _render(block: Any) -> str:
    return RENDERERS[type(block)](block)


def _render_facts(facts: Facts) -> str:
    return "\n".join(
        f"- {_escape(f.label)}: **{_escape(f.value)}**"
        + (f" ({_escape(f.note)})" if f.note else "")
        for f in facts.items
    )


def _render_journey(journey: Journey) -> str:
    rows = [
        (
            _escape(stop.title),
            "" if stop.seconds is None else show_seconds(stop.seconds),
            _escape(stop.figure),
            _escape(stop.meaning),
        )
        for stop in journey.stops
    ]
    return _tabulate(("Stage", "Time", "Key number", ""), rows, frozenset({1, 2}))


def _render_table(table: Table) -> str:
    rows = [[_render_cell(cell) for cell in row] for row in table.rows]
    caption = f"\n\n{_escape(table.caption)}" if table.caption else ""
    return _tabulate([_escape(title) for title in table.head], rows, table.numeric) + caption


def _render_cell(cell: Cell) -> str:
    text = _escape(cell.text)
    return f"{text} ({_escape(cell.note)})" if cell.note else text


def _render_charts(charts: Charts) -> str:
    return "\n\n".join(map(_render_chart, charts.items))


def _render_chart(chart: Chart) -> str:
    rows = []
    for series in chart.series:
        if series.faint or not series.points:
            continue
        values = [y for _, y in series.points]
        first, last = show_unit(values[0], chart.unit), show_unit(values[-1], chart.unit)
        rows.append((_escape(series.name), draw_spark(values), first, last))
    table = _tabulate(
        (chart.x_label.capitalize() + "s", "", "first", "last"), rows, frozenset({2, 3})
    )
    guide = f" Bar to stay below: {chart.guide[1]}." if chart.guide else ""
    return f"**{_escape(chart.title)}.** {_escape(chart.meaning)}{guide}\n\n{table}"


def _render_bars(bars: Bars) -> str:
    rows = [
        (
            _escape(label),
            _escape(show_model(bar.name)),
            "█" * round(bar.value * BAR_WIDTH),
            show_percent(bar.value),
        )
        for label, items in bars.groups
        for bar in items
    ]
    return f"**{_escape(bars.title)}.** {_escape(bars.meaning)}\n\n" + _tabulate(
        ("", "", "", ""), rows, frozenset({3})
    )


def _render_gantt(gantt: Gantt) -> str:
    width = 72
    mark = {"generate": "g", "score": "s", "learn": "l", "sync": "y", "save": "v", "wait": "."}
    lines = []
    size = max((len(lane.actor) for lane in gantt.lanes), default=0)
    for lane in gantt.lanes:
        row = [" "] * width
        for what in reversed(ACTIVITIES):
            for span in lane.spans:
                if span.what == what:
                    start = int(span.start / gantt.seconds * width)
                    end = max(start + 1, round(span.end / gantt.seconds * width))
                    row[start:end] = [mark[what]] * (min(end, width) - start)
        lines.append(f"{lane.actor:<{size}} |{''.join(row[:width])}|")
    legend = ", ".join(f"{letter} {what}" for what, letter in mark.items())
    rows = [
        [_escape(lane.actor), *(show_percent(lane.shares.get(w, 0.0), 0) for w in mark)]
        for lane in gantt.lanes
    ]
    table = _tabulate(("Whole run", *mark), rows, frozenset(range(1, 1 + len(mark))))
    return (
        f"**{_escape(gantt.title)}.** {_escape(gantt.meaning)}\n\n"
        + _fence("\n".join([*lines, "", legend]))
        + f"\n\n{table}"
    )


def _render_exchanges(exchanges: Exchanges) -> str:
    parts = [_escape(exchanges.meaning)] if exchanges.meaning else []
    for item in exchanges.items:
        title = f"**{_escape(item.title)}.** " if item.title else ""
        right = f" (right answer {_escape(item.reference)})" if item.reference else ""
        parts.append(f"{title}{_escape(item.question)}{right}")
        for attempt in item.attempts:
            note = f", {_escape(attempt.note)}" if attempt.note else ""
            parts.append(f"{_escape(attempt.badge)}{note}\n\n{_fence(attempt.text)}")
    return "\n\n".join(parts)


def _render_viewer(viewer: Viewer) -> str:
    parts = [_escape(viewer.meaning)]
    for step, reward, prompt, text, fate in viewer.examples:
        note = f" ({_escape(fate)})" if fate else ""
        parts.append(f"Step {step}, reward {reward}{note}: {_escape(prompt)}\n\n{_fence(text)}")
    return "\n\n".join(parts)


def _render_quotes(quotes: Quotes) -> str:
    parts = [_escape(quotes.meaning)] if quotes.meaning else []
    parts.extend(
        f"{_escape(q.label)} ({_escape(q.source)})\n\n{_fence(q.text)}" for q in quotes.items
    )
    return "\n\n".join(parts)


def _render_text(text: Text) -> str:
    return f"### {_escape(text.text)}" if text.heading else _escape(text.text)


def _render_code(code: Code) -> str:
    return _fence(code.text)


def _render_folded(folded: Folded) -> str:
    return "\n\n".join(
        [f"**{_escape(folded.title)}**", *(_render(block) for block in folded.blocks)]
    )


RENDERERS: dict[type, Callable[[Any], str]] = {
    Facts: _render_facts,
    Journey: _render_journey,
    Table: _render_table,
    Charts: _render_charts,
    Bars: _render_bars,
    Gantt: _render_gantt,
    Exchanges: _render_exchanges,
    Viewer: _render_viewer,
    Quotes: _render_quotes,
    Text: _render_text,
    Code: _render_code,
    Folded: _render_folded,
}
