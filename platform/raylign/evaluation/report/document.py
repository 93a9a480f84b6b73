"""The blocks a report is made of: said once, drawn twice (as HTML and as Markdown).

A section says *what* is shown. How it looks is the business of `page` and `markdown` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Tone = Literal["plain", "good", "bad", "muted"]


@dataclass(frozen=True, slots=True)
class Fact:
    """One number and what it is."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """A row of numbers."""

    items: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """A model in the headline: a share in 0..1, and the change from the model before."""

    model: str
    value: float
    stderr: float | None
    gain: float | None


@dataclass(frozen=True, slots=True)
class Hero:
    """The top of the page."""

    eyebrow: str
    title: str
    lead: str
    scores: tuple[Score, ...]
    score_label: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """A stage on the journey; `seconds` None when it was not timed."""

    stage: str
    title: str
    seconds: float | None
    figure: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Journey:
    """Stages in order, with the share of the time each took."""

    stops: tuple[Stop, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell; `share` (0..1) draws a bar below it."""

    text: str
    note: str = ""
    tone: Tone = "plain"
    share: float | None = None
    mono: bool = False
    color: str = "data"
    """Of the bar."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; `numeric` columns are set flush right."""

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[int] = frozenset()
    narrow: frozenset[int] = frozenset()
    """Columns as thin as their content."""
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """A line: points (x, y), and the colour's name."""

    name: str
    points: tuple[tuple[float, float], ...]
    color: str
    faint: bool = False
    """The unsmoothed data behind a smoothed line."""
    dots: bool = False
    """Mark every point: for values that exist at few steps only."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A small plot and its meaning in plain words."""

    title: str
    series: tuple[Series, ...]
    meaning: str
    x_label: str = "step"
    unit: Literal["number", "percent", "seconds"] = "number"
    log: bool = False
    guide: tuple[float, str] | None = None
    """A horizontal line to compare with, and its label."""
    floor: float | None = None
    """The axis reaches down to here."""
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Charts:
    """Plots in a grid."""

    items: tuple[Chart, ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar in a group: value in 0..1."""

    name: str
    value: float
    error: float | None
    color: str


@dataclass(frozen=True, slots=True)
class Bars:
    """Groups of horizontal bars."""

    title: str
    groups: tuple[tuple[str, tuple[Bar, ...]], ...]
    meaning: str


@dataclass(frozen=True, slots=True)
class Span:
    """A coloured piece of a lane, in seconds from the window's beginning."""

    what: str
    start: float
    end: float
    step: int | None


@dataclass(frozen=True, slots=True)
class Lane:
    """One actor: what it did in the window, and its share of the whole run by activity."""

    actor: str
    spans: tuple[Span, ...]
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gantt:
    """Actors over time: a readable window, and the whole run's utilisation."""

    lanes: tuple[Lane, ...]
    seconds: float
    title: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """A model's text with what it was worth."""

    text: str
    badge: str
    tone: Tone
    note: str = ""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and attempts at it."""

    title: str
    question: str
    reference: str
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True, slots=True)
class Exchanges:
    """Questions side by side."""

    items: tuple[Exchange, ...]
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class Viewer:
    """Completions to filter and compare."""

    data: Mapping[str, Any]
    """As `viewer.encode_samples` makes it."""
    examples: tuple[tuple[str, ...], ...]
    """Step, reward, prompt, text and what became of it, for where nothing can be filtered."""
    meaning: str


@dataclass(frozen=True, slots=True)
class Quote:
    """A piece of raw text with its origin."""

    label: str
    source: str
    text: str


@dataclass(frozen=True, slots=True)
class Quotes:
    """Pieces of raw text."""

    items: tuple[Quote, ...]
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; `heading` opens a part of the section."""

    text: str
    heading: bool = False


@dataclass(frozen=True, slots=True)
class Code:
    """Preformatted text."""

    text: str


@dataclass(frozen=True, slots=True)
class Folded:
    """Something to open on demand."""

    title: str
    blocks: tuple[Block, ...]


Block = (
    Facts
    | Journey
    | Table
    | Charts
    | Bars
    | Gantt
    | Exchanges
    | Viewer
    | Quotes
    | Text
    | Code
    | Folded
)


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of the page."""

    key: str
    title: str
    lead: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A whole report."""

    hero: Hero
    sections: tuple[Section, ...]
    notes: tuple[str, ...]
    """What is left out, and why."""
