"""The whole journey: `python -m jobs.quickstart recipe.yaml [section.key=value ...]`.

Corpus, tokenizer, pre-training, fine-tuning, reinforcement learning, evaluation and a report, each
by the job of that name. A rerun begins at the first unfinished stage.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from typing import Any

from jobs import align, evaluate, prepare, pretrain, report, sft
from jobs.entry import STAGES, main
from raylign.config import Recipe
from raylign.footprint import MemoryMeter
from raylign.run import Run, write_json
from raylign.tracking import ProgressBoard

JOURNEY = "journey.json"


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """Every stage of the journey, then the report."""
    board.say(f"[bold]Raylign[/] from raw text to an aligned model, in {run.root}")
    before = [name for name in STAGES if run.find(name)]
    started = time.monotonic()
    with MemoryMeter() as meter:
        try:
            for job in (prepare, pretrain, sft, align, evaluate):
                job.run(recipe, run, board)
        finally:
            if [name for name in STAGES if run.find(name)] != before:
                record_journey(recipe, run, time.monotonic() - started, meter.peak)
    report.run(recipe, run, board)


def record_journey(recipe: Recipe, run: Run, seconds: float, peak: int) -> None:
    """Add this invocation's time to the run's, and keep the larger peak."""
    file = run.root / JOURNEY
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    stages = {name: stage.manifest.seconds for name in STAGES if (stage := run.find(name))}
    write_json(
        file,
        {
            "seconds": round(known.get("seconds", 0.0) + seconds, 1),
            "peak_memory_gb": max(known.get("peak_memory_gb", 0.0), round(peak / 2**30, 2)),
            "stages": stages,
            "seed": recipe.seed,
            "command": f"python -m jobs.quickstart {shlex.join(sys.argv[1:])}",
        },
    )


if __name__ == "__main__":
    main("quickstart", run)
