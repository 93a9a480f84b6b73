"""Several runs of one recipe side by side, such as three seeds: what is the recipe's, and what was
chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylign.config import UserError
from raylign.evaluation.report.comparison import is_share, is_shown, name_metric
from raylign.evaluation.report.document import (
    Block,
    Cell,
    Chart,
    Charts,
    Section,
    Series,
    Table,
    Text,
)
from raylign.evaluation.report.figures import show_model, show_number, show_percent, show_points
from raylign.evaluation.report.findings import Findings, read_findings
from raylign.evaluation.report.learning import SMOOTH_ABOVE, smooth

COLORS = ("rl", "sft", "base", "score", "sync", "learn", "generate", "ink")

# Metric of each step, title, options of the chart.
_CURVES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("reward/total", "Reward", {"floor": 0.0}),
    ("reward/correct", "Correct while sampling", {"unit": "percent", "floor": 0.0}),
    ("kl", "KL to the reference", {"floor": 0.0}),
    ("entropy", "Entropy", {"floor": 0.0}),
    ("length", "Completion length", {}),
    ("grad_norm", "Gradient norm", {"floor": 0.0}),
)
HELD_OUT = "held_out/"


@dataclass(frozen=True, slots=True)
class Sibling:
    """A run among several."""

    name: str
    findings: Findings

    @property
    def seed(self) -> object:
        """Of its reinforcement learning."""
        stages = self.findings.stages
        return stages["align"].settings.get("seed") if "align" in stages else None


def read_siblings(own: Findings, name: str, others: Mapping[str, Path]) -> tuple[Sibling, ...]:
    """The run that is reported on, as `name`, and others by theirs; none without others.

    Raises `UserError` for a directory in which neither `align` nor `evaluate` is finished.
    """
    if not others:
        return ()
    found = [Sibling(name, own)]
    for other, root in others.items():
        findings = read_findings(root, None, completions=False)
        if not {"align", "evaluate"} & findings.stages.keys():
            raise UserError(
                f"report.runs.{other}={root} has neither a finished align nor an evaluate stage"
            )
        found.append(Sibling(other, findings))
    return tuple(found)


def build_siblings(siblings: Sequence[Sibling]) -> Section | None:
    """Curves of all runs in one chart each, and what they score on held-out problems."""
    if not siblings:
        return None
    blocks: list[Block] = []
    charts = list(_draw_curves(siblings))
    if charts:
        blocks.append(Charts(tuple(charts)))
    tables = list(_tabulate_results(siblings))
    if tables:
        blocks += [Text("Held-out results", heading=True), *tables]
    seeds = [sibling.seed for sibling in siblings]
    differ = all(seed is not None for seed in seeds) and len(set(seeds)) == len(seeds)
    return Section(
        key="runs",
        title=f"{len(siblings)} runs side by side",
        lead="What all of them show is the recipe's doing; where they differ, it was chance"
        + (", for their seeds differ." if differ else ", or what was set otherwise."),
        blocks=tuple(blocks),
    )


def summarize_siblings(siblings: Sequence[Sibling]) -> dict[str, Any]:
    """By run: its seed, the reward of each step, and every model's held-out results."""
    return {
        sibling.name: {
            "seed": sibling.seed,
            "rewards": [value for _, value in sibling.findings.column("align", "reward/total")],
            "tasks": sibling.findings.results.get("tasks", {}),
        }
        for sibling in siblings
    }


def _draw_curves(siblings: Sequence[Sibling]) -> Iterable[Chart]:
    known = {key for s in siblings for row in s.findings.metrics.get("align", ()) for key in row}
    held_out: list[tuple[str, str, dict[str, Any]]] = [
        (metric, f"Held out: {metric.removeprefix(HELD_OUT)}", {})
        for metric in sorted(known)
        if metric.startswith(HELD_OUT)
    ]
    for metric, title, options in (*_CURVES, *held_out):
        series = []
        smoothed = False
        for place, sibling in enumerate(siblings):
            points = sibling.findings.column("align", metric)
            if len(points) > SMOOTH_ABOVE:
                points, smoothed = smooth(points, max(5, len(points) // 20)), True
            if points:
                series.append(Series(sibling.name, points, COLORS[place % len(COLORS)]))
        if series:
            meaning = "One line a run" + (
                ", averaged over neighbouring steps." if smoothed else "."
            )
            yield Chart(title, tuple(series), meaning, **options)


def _tabulate_results(siblings: Sequence[Sibling]) -> Iterable[Table]:
    """For each measure a table: models below each other, runs beside each other."""
    measures = dict.fromkeys(
        (task, metric)
        for sibling in siblings
        for task, found in sibling.findings.results.get("tasks", {}).items()
        for metric in found["metric"]
        if is_shown(metric)
    )
    for task, metric in measures:
        yield _tabulate_measure(siblings, task, metric)


def _tabulate_measure(siblings: Sequence[Sibling], task: str, metric: str) -> Table:
    by_run = [
        s.findings.results.get("tasks", {}).get(task, {}).get("metric", {}).get(metric, {})
        for s in siblings
    ]
    models = list(dict.fromkeys(model for scores in by_run for model in scores))
    share = all(is_share(metric, scores) for scores in by_run)
    rows = []
    for model in models:
        scores = [scores.get(model) for scores in by_run]
        cells = [_show_score(score, share) for score in scores]
        values = [float(score["value"]) for score in scores if score is not None]
        rows.append((Cell(show_model(model)), *cells, _show_spread(values, share)))
    if len(models) > 1:
        before, after = models[-2:]
        changes = [
            float(scores[after]["value"]) - float(scores[before]["value"])
            if before in scores and after in scores
            else None
            for scores in by_run
        ]
        known = [change for change in changes if change is not None]
        title = f"{show_model(before)} → {show_model(after)}"
        cells = [_show_change(change, share) for change in changes]
        rows.append((Cell(title), *cells, _show_spread(known, share, change=True)))
    count = max((int(score["n"]) for scores in by_run for score in scores.values()), default=0)
    return Table(
        head=(name_metric(metric), *(s.name for s in siblings), "mean"),
        rows=tuple(rows),
        numeric=frozenset(range(1, len(siblings) + 2)),
        caption=f"{task}, {count:,} documents. ± of a run is the standard error over its "
        "documents; of the mean, the standard deviation between runs.",
    )


def _show_score(score: Mapping[str, Any] | None, share: bool) -> Cell:
    if score is None:
        return Cell("n/a", tone="muted")
    value, stderr = float(score["value"]), score.get("stderr")
    note = "" if stderr is None else _show_error(float(stderr), share)
    return Cell(show_percent(value) if share else show_number(value), note=note)


def _show_change(change: float | None, share: bool) -> Cell:
    if change is None:
        return Cell("n/a", tone="muted")
    return Cell(show_points(change) if share else show_number(change))


def _show_spread(values: Sequence[float], share: bool, change: bool = False) -> Cell:
    if not values:
        return Cell("n/a", tone="muted")
    mean = math.fsum(values) / len(values)
    note = _show_error(statistics.stdev(values), share) if len(values) > 1 else ""
    if change:
        return Cell(_show_change(mean, share).text, note=note)
    return Cell(show_percent(mean) if share else show_number(mean), note=note)


def _show_error(error: float, share: bool) -> str:
    return f"± {100 * error:.1f}" if share else f"± {show_number(error, 2)}"
