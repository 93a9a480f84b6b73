"""What the data report shows beside the blocks of every report, and its HTML.

Text from documents passes through `visible` and `markup.plain`: whatever it holds, it stays text,
inside its box.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from raylign.data.report.plots import Histogram, draw_histogram
from raylign.evaluation.report.document import Block
from raylign.evaluation.report.figures import MINUS, show_percent
from raylign.evaluation.report.markup import color, element, plain, text
from raylign.evaluation.report.page import RENDERERS

Spans = Sequence[tuple[int, int]]

# Control characters, marks that turn the direction of text around, and tags that nobody sees.
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f]"
)
# More combining marks on a letter than any script has.
_PILED_UP = re.compile(
    r"([\u0300-\u036f\u0483-\u0489\u20d0-\u20ff]{3})[\u0300-\u036f\u0483-\u0489\u20d0-\u20ff]+"
)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why documents left a step; `target` is the id of its examples, if there are any."""

    label: str
    count: int
    note: str = ""
    target: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """Documents that reach a step of the funnel, and that pass it."""

    title: str
    reached: int
    passed: int
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class Funnel:
    """Steps, one below the other."""

    steps: tuple[Step, ...]
    meaning: str


@dataclass(frozen=True, slots=True)
class Histograms:
    """Small plots in a grid."""

    items: tuple[Histogram, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """A piece of a document with its origin; `changed` are spans to be marked."""

    label: str
    origin: str
    text: str
    note: str = ""
    changed: tuple[tuple[int, int], ...] = ()
    skipped: int = 0
    """Characters left out before the text."""
    more: int = 0
    """Characters left out behind it."""


@dataclass(frozen=True, slots=True)
class Cards:
    """Cards of one kind, with a heading that can be linked to."""

    target: str
    title: str
    note: str
    items: tuple[Card, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts side by side."""

    title: str
    note: str
    left: Card
    right: Card


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs, one below the other."""

    items: tuple[Pair, ...]
    meaning: str


@dataclass(frozen=True, slots=True)
class Fold:
    """Something to open on demand."""

    title: str
    blocks: tuple[Shown, ...]


Shown = Block | Funnel | Histograms | Cards | Pairs | Fold


@dataclass(frozen=True, slots=True)
class Chapter:
    """A section of the page."""

    key: str
    title: str
    lead: str
    blocks: tuple[Shown, ...]


# Reasons that stand in the open; the others are folded.
_OPEN_REASONS = 12


def visible(content: str) -> str:
    """`content` without characters that are not seen but change how a page looks."""
    return _PILED_UP.sub(r"\1", _INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", content))


def render(block: Shown) -> str:
    """Any block as HTML."""
    if isinstance(block, Fold):
        inside = element("div", *map(render, block.blocks), class_="inside")
        return element("details", text("summary", block.title), inside)
    if isinstance(block, Funnel):
        return _render_funnel(block)
    if isinstance(block, Histograms):
        return element("div", *map(draw_histogram, block.items), class_="charts")
    if isinstance(block, Cards):
        return _render_cards(block)
    if isinstance(block, Pairs):
        pairs = element("div", *map(_render_pair, block.items), class_="pairs")
        return pairs + text("p", block.meaning, class_="meaning")
    return RENDERERS[type(block)](block)


def _render_funnel(funnel: Funnel) -> str:
    widest = max((step.reached for step in funnel.steps), default=0) or 1
    steps = [_render_step(step, widest) for step in funnel.steps]
    return element("div", *steps, class_="funnel") + text("p", funnel.meaning, class_="meaning")


def _render_step(step: Step, widest: int) -> str:
    left = step.reached - step.passed
    lost = f"{MINUS}{left:,}" if left else "none"
    share = f" ({show_percent(left / step.reached)})" if left and step.reached else ""
    pieces = [
        element("i", style=f"width:{100 * step.passed / widest:.2f}%;background:{color('rl')}"),
        element("i", style=f"width:{100 * left / widest:.2f}%;background:{color('bad')}"),
    ]
    chips = [_render_reason(reason) for reason in step.reasons]
    shown = element("p", *chips[:_OPEN_REASONS], class_="chips") if chips else ""
    if chips[_OPEN_REASONS:]:
        rest = element("p", *chips[_OPEN_REASONS:], class_="chips")
        title = text("summary", f"{len(chips) - _OPEN_REASONS} more reasons")
        shown += element("details", title, rest, class_="plain")
    return element(
        "div",
        text("h3", step.title),
        text("p", f"{step.passed:,} stay", class_="stay"),
        text("p", f"{lost}{share}", class_="lost bad" if left else "lost muted"),
        element("div", *pieces, class_="level", aria_hidden="true"),
        shown,
        class_="step",
    )


def _render_reason(reason: Reason) -> str:
    inside = (
        plain(visible(reason.label)),
        text("b", f"{reason.count:,}"),
        text("small", visible(reason.note)),
    )
    if reason.target:
        return element("a", *inside, class_="chip", href=f"#{reason.target}")
    return element("span", *inside, class_="chip")


def _render_cards(cards: Cards) -> str:
    inside = element("div", *map(_render_card, cards.items), class_="quotes")
    heading = element("h3", plain(visible(cards.title)), text("small", visible(cards.note)))
    return element("div", heading, inside, class_="group", id=cards.target or None)


def _render_card(card: Card) -> str:
    label = element(
        "p",
        text("span", visible(card.label)),
        text("small", visible(card.origin)),
        class_="origin",
    )
    return element(
        "article",
        label,
        _render_passage(card),
        text("p", visible(card.note), class_="small"),
        class_="quote passage",
    )


def _render_passage(card: Card) -> str:
    if not card.text:
        return text("p", "(nothing)", class_="small")
    pieces: list[str] = []
    if card.skipped:
        pieces.append(text("small", f"{card.skipped:,} characters before this "))
    at = 0
    for start, end in card.changed:
        pieces += [plain(visible(card.text[at:start])), text("mark", visible(card.text[start:end]))]
        at = end
    pieces.append(plain(visible(card.text[at:])))
    if card.more > 0:
        pieces.append(text("small", f" {card.more:,} more characters"))
    return element("pre", *pieces, dir="auto")


def _render_pair(pair: Pair) -> str:
    heading = element("h3", plain(visible(pair.title)), text("small", visible(pair.note)))
    sides = element("div", _render_card(pair.left), _render_card(pair.right), class_="sides")
    return element("div", heading, sides, class_="pair")
