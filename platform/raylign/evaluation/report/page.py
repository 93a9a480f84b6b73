"""A document as one self-contained HTML page: no network, light and dark, and no script but that
of the sample viewer, where there is one.

Every piece of text passes through `markup.plain`; nothing of the run is trusted to be markup. The
page's own policy forbids what is not in it: were there a mistake, it could load and run nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from raylign.evaluation.report.document import (
    Attempt,
    Bar,
    Bars,
    Cell,
    Chart,
    Charts,
    Code,
    Document,
    Exchange,
    Exchanges,
    Fact,
    Facts,
    Folded,
    Gantt,
    Hero,
    Journey,
    Quote,
    Quotes,
    Score,
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
from raylign.evaluation.report.markup import color, element, plain, text
from raylign.evaluation.report.plots import draw_chart, draw_gantt
from raylign.evaluation.report.timeline import ACTIVITIES, TROUBLE
from raylign.evaluation.report.viewer import hash_script, read_style, render_viewer

FOOTER = "Drawn by Raylign from the run directory alone. This page is one file: it loads nothing"
STAGE_COLORS = {"pretrain": "base", "sft": "sft", "align": "rl", "evaluate": "learn"}
MODEL_COLORS = ("base", "sft", "rl", "score", "sync", "ink")


def render_page(document: Document) -> str:
    """The whole page."""
    style = files("raylign.evaluation.report").joinpath("style.css").read_text(encoding="utf-8")
    alive = any(isinstance(b, Viewer) for section in document.sections for b in section.blocks)
    allowed = hash_script() if alive else "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"
    said = ", and runs its own script alone." if alive else " and runs no script."
    head = "\n".join(
        (
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            text("title", document.hero.title),
            element("style", "\n", style, read_style() if alive else ""),
        )
    )
    links = [text("a", s.key.capitalize(), href=f"#{s.key}") for s in document.sections]
    body = "\n".join(
        (
            _render_hero(document.hero),
            element("nav", element("div", *links)),
            element("main", *map(_render_section, document.sections)),
            element("footer", *(text("p", note) for note in (*document.notes, FOOTER + said))),
        )
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _render_hero(hero: Hero) -> str:
    scores = [_render_score(score, index) for index, score in enumerate(hero.scores)]
    return element(
        "header",
        text("p", hero.eyebrow, class_="eyebrow"),
        text("h1", hero.title),
        text("p", hero.lead, class_="lead"),
        element("div", *scores, class_="scores") if scores else "",
        text("p", hero.score_label, class_="score-label"),
        _render_facts(Facts(hero.facts)),
    )


def _render_score(score: Score, index: int) -> str:
    own = {"base": "base", "sft": "sft", "rl": "rl"}
    name = own.get(score.model, MODEL_COLORS[min(index, len(MODEL_COLORS) - 1)])
    gain = ""
    if score.gain is not None:
        tone = "good" if score.gain >= 0 else "bad"
        gain = text("span", f"{show_points(score.gain)} points", class_=f"gain {tone}")
    return element(
        "div",
        element("p", plain(show_model(score.model)), gain, class_="model"),
        element("p", f"{100 * score.value:.1f}", text("span", "%"), class_="big"),
        _render_track(score.value),
        text("p", "" if score.stderr is None else f"± {100 * score.stderr:.1f}", class_="small"),
        class_="score",
        style=f"--c:{color(name)}",
    )


def _render_track(share: float, whisker: str = "") -> str:
    return element("div", element("i", style=f"width:{100 * share:.1f}%"), whisker, class_="track")


def _render_section(section: Section) -> str:
    return element(
        "section",
        text("h2", section.title),
        text("p", section.lead, class_="lead"),
        *map(_render, section.blocks),
        id=section.key,
    )


def _render(block: Any) -> str:
    return RENDERERS[type(block)](block)


def _render_meaning(meaning: str) -> str:
    return text("p", meaning, class_="meaning")


def _render_facts(facts: Facts) -> str:
    return element("div", *map(_render_fact, facts.items), class_="facts") if facts.items else ""


def _render_fact(fact: Fact) -> str:
    return element(
        "div",
        text("p", fact.label, class_="label"),
        text("p", fact.value, class_="value"),
        text("p", fact.note, class_="small"),
        class_="fact",
    )


def _render_journey(journey: Journey) -> str:
    total = sum(stop.seconds or 0.0 for stop in journey.stops) or 1.0
    pieces, cards = [], []
    for stop in journey.stops:
        hue = color(STAGE_COLORS.get(stop.stage, "data"))
        share = (stop.seconds or 0.0) / total
        time = "" if stop.seconds is None else show_seconds(stop.seconds)
        title = f"{stop.title}: {time}"
        pieces.append(element("i", style=f"flex:{share:.4f};background:{hue}", title=title))
        cards.append(
            element(
                "div",
                text("p", stop.title, class_="label"),
                text("p", stop.figure, class_="value"),
                element("p", plain(stop.meaning), class_="small"),
                element("p", plain(time), text("span", show_percent(share, 0)), class_="time"),
                class_="stop",
                style=f"--c:{hue}",
            )
        )
    bar = element("div", *pieces, class_="share", aria_hidden="true")
    return bar + element("div", *cards, class_="stops")


def _render_table(table: Table) -> str:
    classes = [_choose_classes(table, column) for column in range(len(table.head))]
    head = [
        element("th", plain(title), scope="col", class_=own)
        for title, own in zip(table.head, classes, strict=True)
    ]
    rows = [
        element("tr", *(_render_cell(cell, own) for cell, own in zip(row, classes, strict=True)))
        for row in table.rows
    ]
    body = element("thead", element("tr", *head)) + element("tbody", *rows)
    drawn = element("table", body, class_="many" if len(table.head) > 3 else None)
    return element("div", drawn, class_="scroll") + _render_meaning(table.caption)


def _choose_classes(table: Table, column: int) -> str | None:
    kinds = (("num", table.numeric), ("narrow", table.narrow))
    return " ".join(name for name, columns in kinds if column in columns) or None


def _render_cell(cell: Cell, classes: str | None) -> str:
    content = text("code", cell.text) if cell.mono else plain(cell.text)
    bar = ""
    if cell.share is not None:
        width = 100 * min(max(cell.share, 0.0), 1.0)
        filled = element("i", style=f"width:{width:.1f}%;background:{color(cell.color)}")
        bar = element("span", filled, class_="bar")
    shown = element("span", content, class_=cell.tone)
    return element("td", shown, text("small", cell.note), bar, class_=classes)


def _render_charts(charts: Charts) -> str:
    wide = any(chart.wide for chart in charts.items)
    return element(
        "div", *map(_render_chart, charts.items), class_="charts wide" if wide else "charts"
    )


def _render_chart(chart: Chart) -> str:
    keys = [
        _render_key(s.name, s.color, text("b", show_unit(s.points[-1][1], chart.unit)))
        for s in chart.series
        if s.points and not s.faint
    ]
    return element(
        "figure",
        element("figcaption", text("h3", chart.title), element("p", *keys, class_="keys")),
        draw_chart(chart),
        _render_meaning(chart.meaning),
        class_="chart",
    )


def _render_key(name: str, hue: str, value: str = "", kind: str = "key") -> str:
    return element("span", plain(name), value, class_=kind, style=f"--c:{color(hue)}")


def _render_bars(bars: Bars) -> str:
    groups = [
        element(
            "div", text("p", label, class_="label"), *map(_render_bar, items), class_="bars-group"
        )
        for label, items in bars.groups
    ]
    return element(
        "figure",
        text("h3", bars.title),
        element("div", *groups, class_="bars-grid"),
        _render_meaning(bars.meaning),
        class_="bars",
    )


def _render_bar(bar: Bar) -> str:
    whisker = ""
    if bar.error is not None:
        low, high = max(0.0, bar.value - bar.error), min(1.0, bar.value + bar.error)
        whisker = element("b", style=f"left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%")
    return element(
        "div",
        text("span", show_model(bar.name)),
        _render_track(bar.value, whisker),
        text("span", show_percent(bar.value)),
        class_="hbar",
        style=f"--c:{color(bar.color)}",
    )


def _render_gantt(gantt: Gantt) -> str:
    used = {span.what for lane in gantt.lanes for span in lane.spans}
    keys = [
        _render_key(what, what, kind="key hatched" if what == "wait" else "key")
        for what in ("generate", "score", "learn", "sync", "save", "wait")
        if what in used
    ]
    marks = {s.what for lane in gantt.lanes for s in lane.spans if s.start == s.end}
    for names, hue in ((marks - TROUBLE, "ink"), (marks & TROUBLE, "bad")):
        if names - set(ACTIVITIES):
            shown = ", ".join(sorted(names - set(ACTIVITIES))).replace("_", " ")
            keys.append(_render_key(shown, hue, kind="key marked"))
    others = ", ".join(sorted(used - marks - set(ACTIVITIES)))
    if others:
        keys.append(_render_key(others, "muted"))
    return element(
        "figure",
        element("figcaption", text("h3", gantt.title), element("p", *keys, class_="keys")),
        element("div", draw_gantt(gantt), class_="scroll"),
        _render_meaning(gantt.meaning),
        class_="chart full",
    )


def _render_exchanges(exchanges: Exchanges) -> str:
    cards = element("div", *map(_render_exchange, exchanges.items), class_="exchanges")
    return cards + _render_meaning(exchanges.meaning)


def _render_exchange(exchange: Exchange) -> str:
    right = ""
    if exchange.reference:
        right = element("p", "right answer ", text("b", exchange.reference), class_="small")
    return element(
        "article",
        text("h3", exchange.title),
        text("p", exchange.question, class_="question"),
        right,
        *map(_render_attempt, exchange.attempts),
    )


def _render_attempt(attempt: Attempt) -> str:
    mark = {"good": "✓", "bad": "✗"}.get(attempt.tone, "")
    verdict = (text("b", mark), text("span", attempt.badge), text("small", attempt.note))
    return element(
        "div",
        element("p", *verdict, class_="verdict"),
        text("pre", attempt.text or "(nothing)"),
        class_=f"attempt {attempt.tone}",
    )


def _render_quotes(quotes: Quotes) -> str:
    cards = element("div", *map(_render_quote, quotes.items), class_="quotes")
    return cards + _render_meaning(quotes.meaning)


def _render_quote(quote: Quote) -> str:
    label = element("p", plain(quote.label), text("span", quote.source), class_="label")
    return element("article", label, text("pre", quote.text), class_="quote")


def _render_text(block: Text) -> str:
    return text("h3" if block.heading else "p", block.text)


def _render_code(code: Code) -> str:
    return text("pre", code.text, class_="code")


def _render_folded(folded: Folded) -> str:
    return element("details", text("summary", folded.title), *map(_render, folded.blocks))


RENDERERS: dict[type, Callable[[Any], str]] = {
    Facts: _render_facts,
    Journey: _render_journey,
    Table: _render_table,
    Charts: _render_charts,
    Bars: _render_bars,
    Gantt: _render_gantt,
    Exchanges: _render_exchanges,
    Viewer: render_viewer,
    Quotes: _render_quotes,
    Text: _render_text,
    Code: _render_code,
    Folded: _render_folded,
}
