"""The data report of a run: `python -m jobs.data_report recipe.yaml`.

Writes the stage `data_report`: `data.html`, one page that shows what was read, what became of it
and why, and `data.json` with the same numbers. Of the data stages only `documents` has to be there;
`jobs.prepare` writes the report at its end. The two files also hold the times that the other stages
took, so they may differ between runs whose data are the same; nothing is made from them.
"""

from __future__ import annotations

from jobs.entry import main
from raylign.config import Recipe
from raylign.data.report import STAGES, build_report
from raylign.run import Run, Stage, fingerprint
from raylign.tracking import ProgressBoard


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `data_report` stage."""
    build_data_report(recipe, run, board)


def build_data_report(recipe: Recipe, run: Run, board: ProgressBoard) -> Stage:
    """The `data_report` stage of whatever data stages `run` holds; found when it is of the same.

    A report of others is replaced: it is a view of them, and nothing depends on it. Raises
    `UserError` when there is no `documents` stage.
    """
    run.require("documents", "prepare")
    parents = {
        name: stage.manifest.content for name in STAGES if (stage := run.find(name)) is not None
    }
    done = run.find("data_report")
    if done is not None and done.manifest.fingerprint == fingerprint({}, parents):
        board.say(f"[green]✓[/] data_report: already done ({done.path})")
        return done
    with run.write("data_report", {}, parents) as draft:
        data = build_report(run.root, draft.path)
        draft.summary.update({"missing": data["missing"], **data["headline"]})
    finished = run.require("data_report", "data_report")
    board.say(f"[green]✓[/] data_report: {finished.path / 'data.html'}")
    return finished


if __name__ == "__main__":
    main("data_report", run)
