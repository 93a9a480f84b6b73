"""The report of a run: `python -m jobs.report recipe.yaml ['report.runs={seed 1: runs/b}']`.

Always rebuilt: it is a view of the other stages and costs less than deciding whether it is stale.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

from jobs.entry import STAGES, main
from raylign.config import Recipe, ReportConfig, UserError
from raylign.evaluation.report import build_report
from raylign.run import Run, read_stage
from raylign.tracking import ProgressBoard


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `report` stage."""
    parents = {
        name: stage.manifest.content
        for name in STAGES
        if name != "report" and (stage := run.find(name)) is not None
    }
    if not parents:
        raise UserError(
            f"run {run.root} has no finished stage to report on; "
            "run `python -m jobs.quickstart` on this recipe first"
        )
    config = recipe.report
    parents |= _identify_others(run, config)
    settings = {"seed": recipe.seed, "report": config.model_dump(mode="json")}
    with run.write("report", settings, parents) as draft:
        numbers = build_report(run.root, draft.path, describe_machine(), config.runs, config.name)
        draft.summary.update({"sections": len(numbers["sections"])})
    board.say(f"[green]✓[/] report: {run.root / 'report' / 'report.html'}")


def _identify_others(run: Run, config: ReportConfig) -> dict[str, str]:
    """Content hashes of what is shown of further runs. Raises `UserError` for one that is none."""
    found = {}
    for name, root in config.runs.items():
        if not root.is_dir():
            raise UserError(f"report.runs.{name}={root}: no such directory")
        if root.resolve() == run.root.resolve():
            raise UserError(f"report.runs.{name}={root} is the run itself, which is shown anyway")
        if config.name is None and name == run.root.name:
            raise UserError(f"report.runs.{name}: the run itself is called so; give report.name")
        for stage in ("align", "evaluate"):
            if (made := read_stage(root / stage)) is not None:
                found[f"{name}/{stage}"] = made.manifest.content
    return found


def describe_machine() -> dict[str, str]:
    """What the report says of this machine."""
    import ray
    import torch

    memory = psutil.virtual_memory().total / 2**30
    described = {
        "processor": _name_processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
    }
    if torch.cuda.is_available():
        described["GPUs"] = ", ".join(
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        )
    return described


def _name_processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main("report", run)
