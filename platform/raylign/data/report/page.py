"""The data report as one self-contained HTML page, in the looks of the run's own report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files

from raylign.data.report.blocks import Chapter, render, visible
from raylign.data.report.corpus_chapters import (
    build_composition,
    build_duplicates,
    build_funnel,
)
from raylign.data.report.cut_chapters import build_cuts, build_evaluation
from raylign.data.report.material import STAGES
from raylign.data.report.run_chapters import (
    build_examples,
    build_rejected,
    build_rules,
    build_settings,
    build_stages,
    build_tokens,
    show_size,
)
from raylign.data.report.wording import Data, list_targets
from raylign.evaluation.report.corpora import STEP_NAMES
from raylign.evaluation.report.document import Fact, Facts
from raylign.evaluation.report.figures import show_count, show_percent
from raylign.evaluation.report.markup import element, text

FOOTER = (
    "Drawn by Raylign from the run directory alone; data.json has the same numbers. This page is "
    "one file: it loads nothing and runs no script."
)
RAW = (
    "Texts that left are shown as they were read, with the personal data that they may hold: share "
    "this page as you would share them."
)
# In the order of the page.
_CHAPTERS: tuple[Callable[[Data, Mapping[str, str]], Chapter | None], ...] = (
    build_funnel,
    build_composition,
    build_rules,
    build_duplicates,
    build_evaluation,
    build_cuts,
    build_tokens,
    build_examples,
    build_rejected,
    build_stages,
    build_settings,
)


def render_page(data: Data) -> str:
    """The page of what `gather` returned."""
    targets = list_targets(data)
    chapters = [found for build in _CHAPTERS if (found := build(data, targets)) is not None]
    title = f"Data of {visible(data['run'])}"
    head = (
        '<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        + text("title", title)
        + element("style", "\n", _read_styles())
    )
    links = [text("a", c.title, href=f"#{c.key}") for c in chapters]
    body = (
        _render_header(data, title),
        element("nav", element("div", *links)),
        element("main", *map(_render_chapter, chapters)),
        element("footer", *(text("p", note) for note in _list_notes(data))),
    )
    inside = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n'
        f"<body>\n{inside}\n</body>\n</html>\n"
    )


def _read_styles() -> str:
    packages = ("raylign.evaluation.report", "raylign.data.report")
    return "\n".join(
        files(package).joinpath("style.css").read_text(encoding="utf-8") for package in packages
    )


def _render_header(data: Data, title: str) -> str:
    return element(
        "header",
        text("p", "Data report", class_="eyebrow"),
        text("h1", title),
        text("p", _sum_up(data), class_="lead"),
        render(Facts(_list_facts(data))),
    )


def _sum_up(data: Data) -> str:
    """The page in two sentences."""
    head = data["headline"]
    if head["kept"] is None:
        return (
            f"{head['documents']:,} documents were read. The corpus is not made yet; this page "
            "shows what is known so far."
        )
    share = head["kept_chars"] / head["chars"] if head["chars"] else 0.0
    said = (
        f"{head['kept']:,} of {head['documents']:,} documents stay, with {show_percent(share)} of "
        "the text."
    )
    losses = {
        step["name"]: step["in"] - step["out"] for step in data["steps"] if step["in"] > step["out"]
    }
    if losses:
        worst = max(losses, key=lambda name: losses[name])
        step = STEP_NAMES.get(worst, worst.replace("_", " "))
        said += f" Most of the others left at the step \N{LEFT DOUBLE QUOTATION MARK}{step}"
        said += f"\N{RIGHT DOUBLE QUOTATION MARK}: {losses[worst]:,}."
    return said


def _list_facts(data: Data) -> tuple[Fact, ...]:
    head = data["headline"]
    facts = [
        Fact(
            "Records found", show_count(head["records"]), f"{head['rejected']:,} were no documents"
        ),
        Fact(
            "Documents read", show_count(head["documents"]), f"{show_size(head['bytes'])} of text"
        ),
    ]
    if head["unused"]:
        facts.append(Fact("Beyond a limit", show_count(head["unused"]), "documents left aside"))
    if head["kept"] is not None:
        chars = f"{show_count(head['kept_chars'])} characters"
        facts.append(Fact("Documents kept", show_count(head["kept"]), chars))
    tokens = head["tokens"] or {}
    if "train" in tokens:
        note = f"and {show_count(tokens.get('validation', 0))} for validation"
        facts.append(Fact("Tokens to train on", show_count(tokens["train"]), note))
    return tuple(facts)


def _render_chapter(chapter: Chapter) -> str:
    return element(
        "section",
        text("h2", chapter.title),
        text("p", chapter.lead, class_="lead"),
        *map(render, chapter.blocks),
        id=chapter.key,
    )


def _list_notes(data: Data) -> list[str]:
    """What the reader should know of the page itself."""
    missing = ", ".join(STAGES[name].lower() for name in data["missing"])
    notes = [f"Not part of this run, and left out above: {missing}."] if missing else []
    if data["examples"] or data["rejected"]:
        notes.append(RAW)
    return [*notes, FOOTER]
