"""What a run directory says of itself: read once, in one place, before anything is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylign.evaluation.report.sampling import NOTHING, Samples, read_samples
from raylign.evaluation.report.timeline import ACTIVITIES, Event
from raylign.run import Manifest, read_stage
from raylign.tracking import EVENTS_FILE, METRICS_FILE, read_lines

STAGES = ("corpus", "tokenizer", "shards", "pretrain", "sft", "align", "evaluate")
TITLES = {
    "corpus": "Corpus",
    "tokenizer": "Tokenizer",
    "shards": "Shards",
    "pretrain": "Pretraining",
    "sft": "Fine-tuning",
    "align": "Reinforcement learning",
    "evaluate": "Evaluation",
}

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that is shown; what the run lacks is None or empty."""

    name: str
    stages: Mapping[str, Manifest]
    journey: Mapping[str, Any]
    """`seconds`, `peak_memory_gb`, `stages`, `seed`, `command`, where the run recorded them."""
    machine: Mapping[str, Any]
    funnel: Mapping[str, Any]
    vocabulary: int | None
    tokenizers: Any
    """Content of `tokenizer/comparison.json`."""
    shards: Mapping[str, Any]
    metrics: Mapping[str, Rows]
    """By stage: one row a step."""
    samples: Mapping[str, Rows]
    """By stage: `step`, `prompt`, `text`."""
    events: tuple[Event, ...]
    examples: Rows
    """Rollouts of `align`."""
    results: Mapping[str, Any]
    completions: Samples = NOTHING
    """Of `align`, as many as a page can hold."""
    incidents: Rows = ()
    """What befell the actors of `align`: rows with `time` and `what`."""

    def seconds(self, stage: str) -> float | None:
        """Time of a stage: as the journey measured it, else as its manifest says."""
        timed = self.journey.get("stages", {}).get(stage)
        if timed is not None:
            return float(timed)
        return self.stages[stage].seconds if stage in self.stages else None

    def column(self, stage: str, metric: str) -> tuple[tuple[float, float], ...]:
        """(step, value) wherever `metric` was logged as a finite number."""
        return tuple(
            (float(row["step"]), float(row[metric]))
            for row in self.metrics.get(stage, ())
            if isinstance(row.get(metric), int | float) and math.isfinite(row[metric])
        )

    def value(self, task: str, metric: str, model: str) -> Mapping[str, Any] | None:
        """`value`, `stderr` and `n` of one evaluation."""
        found = self.results.get("tasks", {}).get(task, {}).get("metric", {}).get(metric, {})
        return found.get(model)


def read_findings(
    root: Path, machine: Mapping[str, Any] | None, completions: bool = True
) -> Findings:
    """Read the finished stages below `root`; missing ones are simply left out, and so are
    `completions` that nobody wants to look at."""
    stages = {}
    for name in STAGES:
        stage = read_stage(root / name)
        if stage is not None:
            stages[name] = stage.manifest
    learning = [name for name in ("pretrain", "sft", "align") if name in stages]
    align = root / "align" if "align" in stages else None
    return Findings(
        name=root.name,
        stages=stages,
        journey=_read(root / "journey.json"),
        machine=machine or {},
        funnel=_read(root / "corpus" / "funnel.json") if "corpus" in stages else {},
        vocabulary=_count_vocabulary(root / "tokenizer") if "tokenizer" in stages else None,
        tokenizers=_read(root / "tokenizer" / "comparison.json") if "tokenizer" in stages else {},
        shards=_read(root / "shards" / "index.json") if "shards" in stages else {},
        metrics={name: read_lines(root / name / METRICS_FILE) for name in learning},
        samples={name: read_lines(root / name / "samples.jsonl") for name in learning},
        events=_read_events(align / EVENTS_FILE) if align else (),
        examples=read_lines(align / "examples.jsonl") if align else [],
        results=_read(root / "evaluate" / "results.json") if "evaluate" in stages else {},
        completions=read_samples(align / "rollouts.jsonl") if align and completions else NOTHING,
        incidents=_read_incidents(align / EVENTS_FILE) if align else (),
    )


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _count_vocabulary(directory: Path) -> int | None:
    model = _read(directory / "tokenizer.json").get("model", {}) if directory.is_dir() else {}
    added = _read(directory / "tokenizer.json").get("added_tokens", [])
    vocabulary = model.get("vocab", {})
    # Unigram models list pairs of piece and score, the others map pieces to ids.
    pieces = (pair[0] for pair in vocabulary) if isinstance(vocabulary, list) else vocabulary
    entries = {*pieces, *(token["content"] for token in added)}
    return len(entries) or None


def _read_incidents(file: Path) -> Rows:
    """Events that are not what actors do all day, in order of time."""
    rows = [
        row
        for row in read_lines(file)
        if {"time", "what"} <= row.keys() and row["what"] not in ACTIVITIES
    ]
    return sorted(rows, key=lambda row: float(row["time"]))


def _read_events(file: Path) -> tuple[Event, ...]:
    """Events with an actor and a duration, and what befell an actor at one moment; in order of
    time."""
    events = []
    for row in read_lines(file):
        if {"actor", "what", "start", "end"} <= row.keys():
            start, end = float(row["start"]), float(row["end"])
        elif {"actor", "what", "time"} <= row.keys() and row["what"] not in ACTIVITIES:
            start = end = float(row["time"])
        else:
            continue
        if end >= start:
            actor, what = str(row["actor"]), str(row["what"])
            events.append(Event(actor, what, start, end, row.get("step")))
    return tuple(sorted(events, key=lambda e: (e.start, e.actor, e.end)))
