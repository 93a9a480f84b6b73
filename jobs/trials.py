"""The trials of a search, for people: a table, a plot, and samples side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from raylign.config import TuneConfig
from raylign.training.tuning import Trial

BEST = "#1a7f37"
COLORS = {"finished": "#1f6feb", "stopped": "#9aa4b1", "failed": "#d1242f"}


@dataclass(frozen=True, slots=True)
class TrialRow:
    """A trial and what its stage left."""

    trial: Trial
    parameters: int | None
    trainable: int | None
    curve: tuple[tuple[int, dict[str, Any]], ...]
    """(step, metrics) of every row that it logged."""
    samples: tuple[tuple[str, str], ...]
    """(prompt, text) at its last step."""


def order(rows: Sequence[TrialRow], config: TuneConfig) -> list[TrialRow]:
    """Best first; those without a result last."""
    sign = 1.0 if config.goal == "min" else -1.0

    def place(row: TrialRow) -> tuple[int, float, str]:
        late = ("finished", "stopped", "failed").index(row.trial.status)
        metric = row.trial.metric
        return late, math.inf if math.isnan(metric) else sign * metric, row.trial.name

    return sorted(rows, key=place)


def tabulate(rows: Sequence[TrialRow], best: str, config: TuneConfig) -> Table:
    """For the terminal."""
    table = Table(title=f"{config.stage}: {len(rows)} trials by {config.metric}")
    for column in _columns(config):
        table.add_column(column, justify="right")
    for row in order(rows, config):
        style = "bold green" if row.trial.name == best else None
        table.add_row(*_cells(row, config), style=style)
    return table


def write_trials(rows: Sequence[TrialRow], best: str, config: TuneConfig, directory: Path) -> None:
    """`trials.jsonl` for programs and `trials.md` for people."""
    with (directory / "trials.jsonl").open("w", encoding="utf-8") as stream:
        for row in order(rows, config):
            line = asdict(row.trial) | {
                "parameters": row.parameters,
                "trainable": row.trainable,
                "best": row.trial.name == best,
                "curve": [[step, values.get(config.metric)] for step, values in row.curve],
            }
            stream.write(json.dumps(line, default=str) + "\n")
    columns = _columns(config)
    lines = [
        f"# {config.stage}: {len(rows)} trials by {config.metric}",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in order(rows, config):
        cells = [_escape(cell) for cell in _cells(row, config)]
        if row.trial.name == best:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    failures = [row for row in rows if row.trial.failure]
    lines += ["", *(f"- `{row.trial.name}` failed: {row.trial.failure}" for row in failures)]
    lines += ["", "![quality against size and time](trials.svg)", ""]
    (directory / "trials.md").write_text("\n".join(lines), encoding="utf-8")


def draw_trials(rows: Sequence[TrialRow], best: str, config: TuneConfig, file: Path) -> None:
    """Quality against trainable parameters and against time, and every trial's curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    size, clock, curves = figure.subplots(1, 3)
    for row in order(rows, config):
        trial, color = row.trial, COLORS[row.trial.status]
        chosen = trial.name == best
        mark = {"color": BEST if chosen else color, "s": 90 if chosen else 40, "zorder": 3}
        mark["marker"] = "*" if chosen else "o"
        if row.trainable and not math.isnan(trial.metric):
            size.scatter(row.trainable, trial.metric, **mark)
        if not math.isnan(trial.metric):
            clock.scatter(trial.seconds, trial.metric, **mark)
        points = [(s, v[config.metric]) for s, v in row.curve if config.metric in v]
        if points:
            style = {"color": mark["color"], "linewidth": 2.2 if chosen else 1.0}
            curves.plot(*zip(*points, strict=True), **style)
    size.set(xlabel="trainable parameters", ylabel=config.metric, xscale="log")
    clock.set(xlabel="seconds of the trial")
    curves.set(xlabel="step")
    for axes in (size, clock, curves):
        axes.grid(alpha=0.3)
    for status in dict.fromkeys(row.trial.status for row in rows):
        clock.scatter([], [], color=COLORS[status], s=40, label=status)
    clock.scatter([], [], color=BEST, s=90, marker="*", label="best")
    clock.legend(fontsize=8)
    label = "best: " + ", ".join(_cells_of_values(rows, best))
    figure.suptitle(f"{config.stage}, {len(rows)} trials; {label}", fontsize=10)
    figure.savefig(file)


def show_samples(rows: Sequence[TrialRow], config: TuneConfig, file: Path) -> None:
    """What every finished trial makes of the sample prompts, prompt by prompt."""
    ranked = [row for row in order(rows, config) if row.samples]
    lines = ["# Samples side by side", ""]
    prompts = list(dict.fromkeys(prompt for row in ranked for prompt, _ in row.samples))
    for prompt in prompts:
        lines += [f"## {_escape(prompt)}", ""]
        for row in ranked:
            said = next((text for asked, text in row.samples if asked == prompt), None)
            if said is not None:
                values = ", ".join(f"{k}={v}" for k, v in row.trial.values.items())
                title = f"**{row.trial.metric:.4f}** ({_escape(values)})"
                quoted = "\n".join(f"    {line}" for line in said.splitlines() or [""])
                lines += [title, "", quoted, ""]
    file.write_text("\n".join(lines), encoding="utf-8")


def _columns(config: TuneConfig) -> list[str]:
    return [config.metric, *config.space, "trainable", "step", "seconds", "status"]


def _cells(row: TrialRow, config: TuneConfig) -> list[str]:
    trial = row.trial
    values = [_show(trial.values.get(key)) for key in config.space]
    return [
        "" if math.isnan(trial.metric) else f"{trial.metric:.4f}",
        *values,
        "" if row.trainable is None else f"{row.trainable:,}",
        f"{trial.step}",
        f"{trial.seconds:.0f}",
        trial.status,
    ]


def _cells_of_values(rows: Sequence[TrialRow], name: str) -> list[str]:
    chosen = next(row.trial for row in rows if row.trial.name == name)
    return [f"{key}={_show(value)}" for key, value in chosen.values.items()]


def _show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
