"""Before and after: every model on the same tasks, and the answers that changed."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from raylign.evaluation.report.alignment import lay_out
from raylign.evaluation.report.document import (
    Attempt,
    Bar,
    Bars,
    Block,
    Cell,
    Exchange,
    Exchanges,
    Section,
    Table,
    Text,
    Tone,
)
from raylign.evaluation.report.figures import (
    show_model,
    show_number,
    show_percent,
    show_points,
)
from raylign.evaluation.report.findings import Findings

FIXED_SHOWN = 6
MODEL_COLORS = ("base", "sft", "rl", "score", "sync", "ink")
_LOWER_IS_BETTER = re.compile(r"perplexity|bits|loss|error|brier")
_DIGITS = re.compile(r"exact_(\d+)_digit")
_NAMES = {
    "exact": "Correct answers",
    "format": "Answers in the asked form",
    "bits_per_byte": "Bits per byte (lower is better)",
    "byte_perplexity": "Byte perplexity (lower is better)",
}

Scores = Mapping[str, Mapping[str, Any]]


def name_colors(findings: Findings) -> dict[str, str]:
    """A colour for each model; base, sft and rl keep those of their stages."""
    models = list(findings.results.get("models", ()))
    own = {"base": "base", "sft": "sft", "rl": "rl"}
    free = [c for c in MODEL_COLORS if c not in {own.get(m) for m in models}]
    return {m: own.get(m) or free.pop(0) if m in own or free else "ink" for m in models}


def is_lower_better(findings: Findings, task: str, metric: str) -> bool:
    """Whether a smaller value is an improvement."""
    told = findings.results.get("higher_is_better", {}).get(task, {}).get(metric)
    return bool(_LOWER_IS_BETTER.search(metric)) if told is None else not told


def is_share(metric: str, scores: Scores) -> bool:
    """Whether the metric is a share of documents, shown in percent."""
    return not _LOWER_IS_BETTER.search(metric) and all(
        0 <= s["value"] <= 1 for s in scores.values()
    )


def is_shown(metric: str) -> bool:
    """Whether the metric stands in tables; those by the length of a problem are drawn."""
    return _DIGITS.fullmatch(metric) is None


def name_metric(metric: str) -> str:
    """What people call it."""
    return _NAMES.get(metric, metric.replace("_", " "))


def build_comparison(findings: Findings) -> Section | None:
    """The evaluation."""
    tasks = findings.results.get("tasks", {})
    models = list(findings.results.get("models", ()))
    if not tasks or not models:
        return None
    blocks: list[Block] = [_tabulate(findings, models)]
    blocks.extend(_draw_digits(findings))
    blocks.extend(_show_fixed(findings, models))
    return Section(
        key="evaluation",
        title="Before and after",
        lead="The same held-out problems for every model, answered greedily, through "
        "lm-evaluation-harness. ± is one standard error; a change is coloured when it is larger "
        "than two of its own.",
        blocks=tuple(blocks),
    )


def _tabulate(findings: Findings, models: list[str]) -> Table:
    pairs = list(itertools.pairwise(models))
    rows, colors = [], name_colors(findings)
    for task, found in findings.results["tasks"].items():
        for metric, scores in found["metric"].items():
            if not is_shown(metric):
                continue
            count = max((int(s["n"]) for s in scores.values()), default=0)
            name = Cell(name_metric(metric), note=f"{task}, {count:,} documents")
            values = [_show_score(metric, scores, scores.get(m), colors[m]) for m in models]
            changes = [_show_change(findings, task, metric, pair) for pair in pairs]
            rows.append((name, *values, *changes))
    return Table(
        head=(
            "",
            *map(show_model, models),
            *(f"{show_model(a)} → {show_model(b)}" for a, b in pairs),
        ),
        rows=tuple(rows),
        numeric=frozenset(range(1, 1 + len(models) + len(pairs))),
        caption="Changes in points of a percent for shares, in the metric's own unit otherwise.",
    )


def _show_score(metric: str, scores: Scores, score: Mapping[str, Any] | None, color: str) -> Cell:
    if score is None:
        return Cell("n/a", tone="muted")
    value, stderr = score["value"], score.get("stderr")
    if is_share(metric, scores):
        note = "" if stderr is None else f"± {100 * stderr:.1f}"
        return Cell(show_percent(value), note=note, share=value, color=color)
    return Cell(show_number(value), note="" if stderr is None else f"± {show_number(stderr, 2)}")


def measure_change(
    findings: Findings, task: str, metric: str, pair: tuple[str, str]
) -> tuple[float, float | None] | None:
    """Difference between two models and its standard error.

    The evaluation's own paired error where it has one (both models saw the same documents), else
    the root of the summed squares.
    """
    for found in findings.results.get("differences", ()):
        if (found["task"], found["metric"], found["from"], found["to"]) == (task, metric, *pair):
            return float(found["value"]), found.get("stderr")
    before, after = (findings.value(task, metric, model) for model in pair)
    if before is None or after is None:
        return None
    errors = [score.get("stderr") for score in (before, after)]
    known = [float(e) for e in errors if e is not None]
    return after["value"] - before["value"], math.hypot(*known) if len(known) == 2 else None


def _show_change(findings: Findings, task: str, metric: str, pair: tuple[str, str]) -> Cell:
    change = measure_change(findings, task, metric, pair)
    if change is None:
        return Cell("n/a", tone="muted")
    value, stderr = change
    scores = findings.results["tasks"][task]["metric"][metric]
    share = is_share(metric, scores)
    tone: Tone = "muted"
    if stderr is not None and abs(value) > 2 * stderr:
        better = (value < 0) == is_lower_better(findings, task, metric)
        tone = "good" if better else "bad"
    text = show_points(value) if share else ("+" if value > 0 else "") + show_number(value)
    note = ""
    if stderr is not None:
        note = f"± {100 * stderr:.1f}" if share else f"± {show_number(stderr, 2)}"
    return Cell(text, note=note, tone=tone)


def _draw_digits(findings: Findings) -> list[Block]:
    """Accuracy by the length of the operands."""
    colors = name_colors(findings)
    for found in findings.results["tasks"].values():
        lengths = sorted(
            (int(match[1]), metric)
            for metric in found["metric"]
            if (match := _DIGITS.fullmatch(metric)) is not None
        )
        if not lengths:
            continue
        groups = tuple(
            (
                f"{digits} digit{'s' if digits > 1 else ''}",
                tuple(
                    Bar(model, score["value"], score.get("stderr"), colors[model])
                    for model, score in found["metric"][metric].items()
                ),
            )
            for digits, metric in lengths
        )
        meaning = (
            "Grouped by the digits of the larger number. The longer a problem, the harder it is to "
            "guess at sight."
        )
        return [Bars("Correct answers by problem length", groups, meaning)]
    return []


def _show_fixed(findings: Findings, models: list[str]) -> list[Block]:
    """Questions that the last model gets right and the one before it got wrong."""
    answers = findings.results.get("answers", {})
    if len(models) < 2 or not all(model in answers for model in models[-2:]):
        return []
    before, after = models[-2:]
    old = {row["question"]: row for row in answers[before]}
    changed = [(old[row["question"]], row) for row in answers[after] if row["question"] in old]
    fixed = [(a, b) for a, b in changed if b["correct"] and not a["correct"]]
    if not fixed:
        return []
    exchanges = tuple(
        Exchange(
            title="",
            question=str(new["question"]),
            reference=str(new["reference"]),
            attempts=(_attempt(was, before), _attempt(new, after)),
        )
        for was, new in fixed[:FIXED_SHOWN]
    )
    blocks: list[Block] = [
        Text(f"Mistakes of {show_model(before)} that {show_model(after)} puts right", heading=True),
        Exchanges(exchanges, _count_turns(findings, before, after)),
    ]
    return blocks


def _count_turns(findings: Findings, before: str, after: str) -> str:
    old, new = show_model(before), show_model(after)
    for found in findings.results.get("differences", ()):
        same = found["metric"] == "exact" and (found["from"], found["to"]) == (before, after)
        if same and "gained" in found:
            return (
                f"Over all {found['n']:,} problems, {new} answers {found['gained']:,} correctly "
                f"that {old} got wrong, and gets {found['lost']:,} wrong that {old} had right."
            )
    return f"Chosen among the answers kept; {new} may also break some that {old} had right."


def _attempt(row: Mapping[str, Any], model: str) -> Attempt:
    right = bool(row["correct"])
    return Attempt(
        lay_out(str(row["answer"])),
        show_model(model),
        "good" if right else "bad",
        "correct" if right else "wrong",
    )
