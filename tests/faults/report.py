"""Rows of the fault table, one after another: `python -m tests.faults.report [NUMBER ...]`.

Writes what came of them into `docs/reliability.md`; rows that were not tried this time stay as they
were, each with the day on which it was tried last. All of them take half an hour on an otherwise
idle machine of two cores.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

from tests.faults import drivers, engines, judges, learners, samples  # noqa: F401
from tests.faults.lab import TRIALS, Lab, Outcome, Row, Trial
from tests.tiny_model import write_tiny_model

PAGE = ROOT / "docs" / "reliability.md"
LONGEST_NOTE = 240
HEAD = """# What happens when something breaks

Written by `make faults` (one row: `make faults ARGS=14`), last on {machine}. Each row is a real run
of `jobs.align` (Ray, rollout workers, learner ranks on gloo) on a tiny model, in which the fault is
caused from outside, or by code that the run does not know of (`tests/faults/sabotage/`). Where
engines are what is tried they are vLLM's. *Detected* and *recovered* count from the fault: until
the run said what was wrong, and until the lost part was at work again or the run had ended as it
should. *Lost* counts completions that were asked for and are neither trained, nor dropped with a
reason, nor in flight. Times depend on the machine, and on what else it does.

{held} of {tried} rows that were tried held{untried}.

| # | fault | what must happen | held | detected, s | recovered, s | lost | seen | tried on |
|---|---|---|---|---|---|---|---|---|
"""


def main(numbers: list[str]) -> int:
    """Try rows in the order given, all without `numbers`; status 1 when one did not hold."""
    known = list_numbers()
    if unknown := sorted(set(numbers) - set(known)):
        sys.stderr.write(f"no row {', '.join(unknown)}; there are {', '.join(known)}\n")
        return 2
    trials = {row.number: trial for trial in TRIALS for row in trial.rows}
    chosen = dict.fromkeys(trials[number] for number in numbers or trials)  # each once
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        lab = Lab(Path(name), write_tiny_model(Path(name) / "model"))
        for trial in chosen:
            lines, held = attempt(trial, lab)
            failed += not held
            sys.stdout.write("".join(lines.values()))
            sys.stdout.flush()
            write_page(PAGE, lines)
    return 1 if failed else 0


def attempt(trial: Trial, lab: Lab) -> tuple[dict[str, str], bool]:
    """The lines of a trial's rows, and whether all held. Of one that did not, the row at which it
    ended, for nothing is known of the others."""
    started, found = time.monotonic(), list[Outcome]()
    sys.stderr.write(f"{trial.name}: {', '.join(row.title for row in trial.rows)}\n")
    try:
        lost = trial.cause(lab, found)
        assert not lost, f"{lost} completions lost"
        assert len(found) == len(trial.rows)
    except Exception as error:  # the next trial is made all the same
        traceback.print_exc()
        trouble = str(error).splitlines()[0] if str(error) else type(error).__name__
        row = trial.rows[min(len(found), len(trial.rows) - 1)]
        return {row.number: format_row(row, None, trouble.replace(str(lab.root), "..."))}, False
    finally:
        sys.stderr.write(f"{trial.name}: {time.monotonic() - started:.0f} s\n")
    lines = {}
    for row, outcome in zip(trial.rows, found, strict=True):
        note = outcome.note.replace(str(lab.root), "...")
        lines[row.number] = format_row(row, replace(outcome, lost=lost), note)
    return lines, True


def list_numbers() -> list[str]:
    """Of all rows, as the table has them: 9, 9b, 10."""
    return sort_numbers(row.number for trial in TRIALS for row in trial.rows)


def format_row(row: Row, outcome: Outcome | None, note: str) -> str:
    """A line of the table."""
    held, times, lost = "**no**", ["", ""], ""
    if outcome is not None:
        both = (outcome.detected_s, outcome.recovered_s)
        held, times = "yes", ["" if s is None else f"{s:.1f}" for s in both]
        lost = "" if outcome.lost is None else str(outcome.lost)
    note = re.sub(r"\b(?!127\.)\d+(?:\.\d+){3}:\d+", "HOST:PORT", note)
    seen = note if len(note) <= LONGEST_NOTE else note[: LONGEST_NOTE - 3] + "..."
    today = str(datetime.now(UTC).date())
    cells = [row.number, row.title, row.expected, held, *times, lost, seen, today]
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |\n"


def write_page(page: Path, lines: dict[str, str]) -> None:
    """Put lines, by their row's number, in place of those that the page has."""
    numbers = list_numbers()
    found = {}
    if page.is_file():
        for line in page.read_text(encoding="utf-8").splitlines(keepends=True):
            cells = line.split(" | ")
            number = cells[0].removeprefix("| ")
            if len(cells) == 9 and number in numbers:
                found[number] = line
    found |= lines
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    missing = [number for number in numbers if number not in found]
    head = HEAD.format(
        machine=machine,
        held=sum(line.split(" | ")[3] == "yes" for line in found.values()),
        tried=len(found),
        untried=f"; not tried yet: {', '.join(missing)}" if missing else "",
    )
    page.parent.mkdir(exist_ok=True)
    page.write_text(head + "".join(found[n] for n in sort_numbers(found)), encoding="utf-8")


def sort_numbers(numbers: Iterable[str]) -> list[str]:
    """By the number, then by the letter."""
    return sorted(numbers, key=lambda n: (int(re.findall(r"\d+", n)[0]), n))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
