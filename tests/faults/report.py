"""All rows of the fault table, one after another: `python -m tests.faults.report [NUMBER ...]`.

Writes `docs/reliability.md` when all rows are tried. Needs an otherwise idle machine of two cores,
and about half an hour.
"""

from __future__ import annotations

import platform
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

from tests.faults import drivers, engines, judges, learners, samples  # noqa: F401
from tests.faults.lab import FAULTS, Fault, Lab, Outcome
from tests.tiny_model import write_tiny_model

PAGE = ROOT / "docs" / "reliability.md"
HEAD = """# What happens when something breaks

Written by `make faults` ({date}, {machine}). Each row is a real run of `jobs.align` (Ray, vLLM,
learner ranks on gloo) on a tiny model, in which the fault is caused from outside. *Detected* and
*recovered* count from the fault: until the run said what was wrong, and until the lost part was at
work again or the run had ended as it should. *Lost* counts completions that were asked for and are
neither trained, nor dropped with a reason, nor in flight.

| # | fault | what must happen | held | detected, s | recovered, s | lost | seen |
|---|---|---|---|---|---|---|---|
"""


def main(numbers: list[str]) -> int:
    """Try rows; status 1 when one did not hold."""
    chosen = [row for row in FAULTS if not numbers or row.number in numbers]
    lines, failed = [], 0
    with tempfile.TemporaryDirectory() as name:
        lab = Lab(Path(name), write_tiny_model(Path(name) / "model"))
        for row in chosen:
            outcome, trouble = attempt(row, lab)
            failed += outcome is None
            line = format_row(row, outcome, trouble)
            lines.append(line)
            sys.stdout.write(line)
            sys.stdout.flush()
    if not numbers:
        machine = f"{platform.machine()}, {platform.system()} {platform.release()}"
        head = HEAD.format(date=datetime.now(UTC).date(), machine=machine)
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(head + "".join(lines), encoding="utf-8")
    return 1 if failed else 0


def attempt(row: Fault, lab: Lab) -> tuple[Outcome | None, str]:
    """What came of a row, or why it did not hold."""
    started = time.monotonic()
    sys.stderr.write(f"{row.number}: {row.title}\n")
    try:
        outcome = row.cause(lab)
        assert outcome.lost == 0, f"{outcome.lost} completions lost"
    except Exception as error:  # the next row is tried all the same
        traceback.print_exc()
        return None, str(error).splitlines()[0] if str(error) else type(error).__name__
    finally:
        sys.stderr.write(f"{row.number}: {time.monotonic() - started:.0f} s\n")
    return outcome, ""


def format_row(row: Fault, outcome: Outcome | None, trouble: str) -> str:
    """A line of the table."""
    if outcome is None:
        cells = [row.number, row.title, row.expected, "**no**", "", "", "", trouble]
    else:
        times = ["" if s is None else f"{s:.1f}" for s in (outcome.detected_s, outcome.recovered_s)]
        held = [row.number, row.title, row.expected, "yes", *times, str(outcome.lost)]
        cells = [*held, outcome.note]
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |\n"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
