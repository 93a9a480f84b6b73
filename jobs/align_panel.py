"""What a terminal shows of reinforcement learning: a panel below the bar, at the end a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

LAST_ROWS = 10

Metrics = Mapping[str, float]

# Heading, metric, how it is shown.
_COLUMNS = (
    ("step", "step", "{:.0f}"),
    ("reward", "reward/total", "{:.3f}"),
    ("length", "length", "{:.0f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("kl", "kl", "{:.4f}"),
    ("grad", "grad_norm", "{:.2f}"),
    ("clip", "clip_fraction", "{:.1%}"),
    ("mismatch", "mismatch/mean_abs", "{:.0e}"),
    ("stale", "staleness/mean", "{:.1f}"),
    ("tok/s", "tokens_per_second", "{:,.0f}"),
    ("waits", "wait/trainer", "{:.1f} s"),
)


def note_step(metrics: Metrics) -> str:
    """A step in one line, for the bar and for logs."""
    return (
        f"reward {metrics.get('reward/total', 0.0):.2f}  length {metrics.get('length', 0.0):.0f}  "
        f"kl {metrics.get('kl', 0.0):.3f}  "
        f"mismatch {metrics.get('mismatch/mean_abs', 0.0):.1e}"
    )


def draw_panel(metrics: Metrics, news: str = "") -> Table:
    """The numbers of the last step; those that were not measured are left out. `news`: the last
    thing that befell a worker."""
    panel = Table.grid(padding=(0, 2))
    panel.add_column(style="dim", min_width=9)
    panel.add_column(overflow="fold")
    lines = {
        "reward": _list_rewards(metrics),
        "text": [
            _show(metrics, "length", "length {:.0f}"),
            _show(metrics, "length/max", "longest {:.0f}"),
            _show(metrics, "truncated", "cut off {:.0%}"),
            _show(metrics, "turns", "turns {:.1f}", unless=1.0),
            _show(metrics, "staleness/mean", "stale {:.1f}"),
            _show(metrics, "staleness/max", "at most {:.0f}"),
        ],
        "policy": [
            _show(metrics, "entropy", "entropy {:.3f}"),
            _show(metrics, "kl", "kl {:.4f}"),
            _show(metrics, "grad_norm", "grad norm {:.2f}"),
            _show(metrics, "clip_fraction", "clipped {:.1%}"),
            _show(metrics, "mismatch/mean_abs", "mismatch {:.1e}"),
        ],
        "time": [
            _show(metrics, "tokens_per_second", "{:,.0f} tokens/s"),
            _show(metrics, "step_seconds", "step {:.1f} s"),
            _show(metrics, "wait/trainer", "learner waited {:.1f} s"),
            _show(metrics, "wait/generator", "rollouts {:.1f} s"),
            _show(metrics, "sync_seconds", "sync {:.2f} s"),
        ],
        "workers": _list_workers(metrics),
        "samples": _list_samples(metrics),
        "news": [news],
    }
    for label, shown in lines.items():
        line = "  ".join(part for part in shown if part)
        if line:
            style = "yellow" if label == "news" else "cyan" if label == "time" else ""
            panel.add_row(Text(label), Text(line, style=style))
    return panel


def tabulate_steps(rows: Sequence[Metrics]) -> RenderableType:
    """The last steps, one a line; columns that no step measured are left out."""
    last = rows[-LAST_ROWS:]
    columns = [column for column in _COLUMNS if any(column[1] in row for row in last)]
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for heading, _, _ in columns:
        table.add_column(heading, justify="right", header_style="dim", no_wrap=True)
    for row in last:
        table.add_row(*(_show(row, metric, shape) for _, metric, shape in columns))
    if len(rows) == len(last):
        return table
    return Group(Text(f"last {len(last)} of {len(rows)} steps", style="dim"), table)


def _list_rewards(metrics: Metrics) -> Iterable[str]:
    parts = sorted(name for name in metrics if name.startswith("reward/") and name.count("/") == 1)
    shown = [_show(metrics, "reward/total", "{:.3f}"), _show(metrics, "reward/std", "± {:.3f}")]
    return shown + [
        f"{name.removeprefix('reward/')} {metrics[name]:.3f}"
        for name in parts
        if name not in ("reward/total", "reward/std")
    ]


def _list_workers(metrics: Metrics) -> list[str]:
    def list_counts(prefix: str, shape: str) -> list[str]:
        return [
            shape.format(count, name.removeprefix(prefix))
            for name, count in sorted(metrics.items())
            if name.startswith(prefix) and count
        ]

    workers = list_counts("workers/", "{1} {0:.0f}")
    return workers + list_counts("restarts/", "restarts of {1} {0:.0f}")


def _list_samples(metrics: Metrics) -> list[str]:
    if "ledger/dispatched" not in metrics:
        return [_show(metrics, "samples", "{:,.0f} learned from in this step")]
    count = {
        name: metrics.get(f"ledger/{name}", 0.0)
        for name in ("dispatched", "trained", "dropped", "in_flight")
    }
    return [
        f"{count['dispatched']:,.0f} dispatched = {count['trained']:,.0f} trained "
        f"+ {count['dropped']:,.0f} dropped + {count['in_flight']:,.0f} in flight"
    ]


def _show(metrics: Metrics, name: str, shape: str, unless: float | None = None) -> str:
    value = metrics.get(name)
    return "" if value is None or value == unless else shape.format(value)
