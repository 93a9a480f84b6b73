"""What became of every completion, and what befell the workers of reinforcement learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raylign.evaluation.report.document import Block, Cell, Section, Table, Text, Tone
from raylign.evaluation.report.figures import show_percent, show_seconds
from raylign.evaluation.report.findings import Findings
from raylign.evaluation.report.timeline import ORDINARY, TROUBLE

INCIDENTS_SHOWN = 60
GOOD = frozenset({"serves", "restored", "replaced", "restarted", "resumed"})
_TOLD = frozenset({"time", "what", "actor", "start", "end", "step", "reason", "text"})


def build_incidents(findings: Findings) -> Section | None:
    """The books, and losses, restarts and changes of size in order of time."""
    blocks: list[Block] = []
    books = count_completions(findings)
    if books:
        blocks.append(_tabulate_books(books))
    if findings.incidents:
        blocks += [Text("What befell the workers", heading=True), _tabulate_incidents(findings)]
    if not blocks:
        return None
    return Section(
        key="books",
        title="Where everything went",
        lead="Each completion that was asked for was learned from, or dropped for a reason that is "
        "counted. A worker that is lost is replaced, and what it had begun is asked for again.",
        blocks=tuple(blocks),
    )


def count_completions(findings: Findings) -> dict[str, float]:
    """Completions by what became of them, as the ledger stood at the last step; where no ledger
    was logged, as the steps add up."""
    rows = findings.metrics.get("align", ())
    if not rows:
        return {}
    dropped: dict[str, float] = {}
    for row in rows:
        for name, count in row.items():
            if name.startswith("dropped/") and count:
                reason = name.removeprefix("dropped/")
                dropped[reason] = dropped.get(reason, 0.0) + count
    last = rows[-1]
    if "ledger/dispatched" not in last:
        learned = sum(row.get("samples", 0.0) for row in rows)
        books = {"learned from": learned} | {f"dropped: {r}": n for r, n in dropped.items()}
        return {"dispatched": sum(books.values())} | books if learned else {}
    books = {"dispatched": last["ledger/dispatched"], "learned from": last["ledger/trained"]}
    prefix = "ledger/dropped/"
    named = {k.removeprefix(prefix): v for k, v in last.items() if k.startswith(prefix) and v}
    dropped = named or dropped
    # Without names, the ledger still knows of what no step saw: undone, or lost between two.
    rest = last.get("ledger/dropped", 0.0) - sum(dropped.values())
    books |= {f"dropped: {reason}": count for reason, count in dropped.items()}
    if rest > 0:
        books["dropped: between steps"] = rest
    if last.get("ledger/in_flight"):
        books["in flight at the last step"] = last["ledger/in_flight"]
    return books


def _tabulate_books(books: Mapping[str, float]) -> Table:
    total = books["dispatched"] or 1.0
    rows = tuple(
        (
            Cell(name, tone="muted" if name.startswith("in flight") else "plain"),
            Cell(f"{count:,.0f}"),
            Cell(show_percent(count / total), share=count / total),
        )
        for name, count in books.items()
    )
    return Table(
        head=("Completions", "Count", "Share"),
        rows=rows,
        numeric=frozenset({1, 2}),
        caption="Dispatched is the sum of the others, always: the ledger refuses to count twice.",
    )


def _tabulate_incidents(findings: Findings) -> Table:
    started = min(
        (event.start for event in findings.events), default=float(findings.incidents[0]["time"])
    )
    rare = [row for row in findings.incidents if row["what"] not in ORDINARY]
    every = len(findings.incidents) <= INCIDENTS_SHOWN
    shown = (findings.incidents if every else rare)[:INCIDENTS_SHOWN]
    rows = []
    for row in shown:
        what = str(row["what"])
        tone: Tone = "bad" if what in TROUBLE else "good" if what in GOOD else "plain"
        step = row.get("step")
        rows.append(
            (
                Cell(show_seconds(max(0.0, float(row["time"]) - started))),
                Cell("" if step is None else str(step)),
                Cell(str(row.get("actor") or "run")),
                Cell(what.replace("_", " "), tone=tone),
                Cell(_tell(row)),
            )
        )
    more = len(findings.incidents) - len(shown)
    return Table(
        head=("After", "Step", "Who", "What", ""),
        rows=tuple(rows),
        numeric=frozenset({0, 1}),
        narrow=frozenset({0, 1, 2, 3}),
        caption=f"{len(shown)} of {more + len(shown):,}; all are in events.jsonl." if more else "",
    )


def _tell(row: Mapping[str, Any]) -> str:
    """What else an event says, in a line."""
    parts = [str(row[name]) for name in ("reason", "text") if row.get(name)]
    parts += [
        f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name not in _TOLD and value is not None
    ]
    return ", ".join(parts)[:300]
