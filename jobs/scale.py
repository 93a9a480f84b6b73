"""More or fewer workers of a run that is going on:
`python -m jobs.scale RUN [--rollouts N] [--judges N] [--rewards N]`.

RUN is the run directory. A newcomer takes the current weights and proves them before it serves; one
that leaves hands over what it has not finished. Training goes on meanwhile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from actors.control import Answer, Wish, ask
from raylign.config import UserError
from raylign.run import read_stage

ROLES = ("rollouts", "judges", "rewards")
DEADLINE_S = 900.0


def scale(run: Path, workers: dict[str, int], deadline_s: float = DEADLINE_S) -> Answer:
    """Ask the run in a directory for numbers of workers by role.

    Raises `UserError` when nothing is asked for, the run has finished, or none is going on there.
    """
    if not workers:
        raise UserError(f"say what there should be: --{' N, --'.join(ROLES)} N")
    for role, count in workers.items():
        if count < 1:
            raise UserError(f"--{role} {count}: at least one is needed")
    stage = run / ".align.partial"
    if not stage.is_dir():
        if read_stage(run / "align") is not None:
            raise UserError(f"the align stage of {run} is finished; there is nothing to scale")
        raise UserError(f"{run} has no align stage that is going on; give its run directory")
    return ask(stage, Wish(workers), deadline_s)


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 when it was done, 2 when not."""
    parser = argparse.ArgumentParser(prog="python -m jobs.scale", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    for role in ROLES:
        parser.add_argument(f"--{role}", type=int, metavar="N", help=f"how many {role}")
    parser.add_argument(
        "--deadline", type=float, default=DEADLINE_S, metavar="S", help="longest wait, in seconds"
    )
    given = parser.parse_args(arguments)
    workers = {role: count for role in ROLES if (count := getattr(given, role)) is not None}
    try:
        answer = scale(given.run, workers, given.deadline)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    (sys.stdout if answer.done else sys.stderr).write(
        f"{answer.text}\n" if answer.done else f"error: {answer.text}\n"
    )
    return 0 if answer.done else 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
