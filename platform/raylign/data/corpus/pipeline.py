"""The corpus: from documents, their signals and their signatures to what is kept.

    documents ─▶ signals ───▶ judge ─┐
        │                            ├─▶ duplicates ─▶ held out ─▶ decide ─▶ documents/, excluded/
        └──────▶ signatures ─────────┘

The first three are stages of their own (`ingest`, `features`). This one applies thresholds, so
other thresholds, another rule of who stays or other evaluation sets measure nothing again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raylign.config import PrepareConfig, UserError
from raylign.data.corpus.decisions import Decision, decide_part, judge_part
from raylign.data.corpus.duplicates import (
    KEPT,
    SETTLED,
    Duplicates,
    find_duplicates,
    save_duplicates,
)
from raylign.data.corpus.features import Files
from raylign.data.corpus.funnel import Tally, describe, explain_empty, summarise, tally_reading
from raylign.data.corpus.occurrences import count_occurrences
from raylign.data.corpus.parts import run_parts
from raylign.data.corpus.repetitions import find_cuts
from raylign.data.decontamination.evaluation_sets import load_items
from raylign.data.decontamination.index import (
    HELD_OUT,
    Item,
    build_index,
    drop_common,
    list_needles,
)
from raylign.data.decontamination.index import Index as EvaluationIndex
from raylign.data.dedup.index import NO_DAY, Index
from raylign.data.documents import read_batches
from raylign.data.textbook.problems import Problems, draw_problems, write_problems
from raylign.run import write_json
from raylign.tracking import ProgressBoard

WORK = ".work"
TEXTBOOK = "textbook"


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The stages that a corpus is made from."""

    files: Files
    """Files of documents with `number`, `file`, `used`, `kind` (of the source), `source`,
    `signals` (file or "") and `quality` (the source's own rules, or null)."""
    stems: tuple[str, ...]
    """Index parts, one for each file."""
    reading: tuple[Mapping[str, Any], ...] = ()
    """Reports of the first pass."""
    earlier: tuple[str, ...] = ()
    """Index parts of earlier corpora."""
    earlier_kept: np.ndarray | None = None
    """bool: which of their documents were kept."""


def build_corpus(
    inputs: Inputs, config: PrepareConfig, seed: int, directory: Path, board: ProgressBoard
) -> dict[str, Any]:
    """Write the corpus into `directory`; returns the numbers worth showing. Ray must be joined.

    Continues with what an earlier attempt left in `directory`. Raises `UserError` when no document
    is left, and `RuntimeError` should an evaluation item survive decontamination.
    """
    work = directory / WORK
    for folder in (work, directory / "documents", directory / "excluded"):
        folder.mkdir(parents=True, exist_ok=True)
    index = Index((*inputs.earlier, *inputs.stems))
    problems = _draw_problems(inputs, config, seed)
    known = _list_items(problems, config)
    decision = Decision(
        quality=config.quality,
        decontaminate=config.decontaminate,
        items=_build_index(known, inputs.files, config, work, board, "count"),
        pii=config.pii,
    )
    duplicates = _compare(inputs, index, config, decision, work, board)
    starts = index.offsets[len(inputs.earlier) :]
    held = _hold_out(inputs, index, duplicates, config.english_held_out_share, seed, starts)
    np.save(work / "held.npy", held)
    rows = [dict(row) | {"start": int(at)} for row, at in zip(inputs.files, starts, strict=False)]
    np.save(work / "cuts.npy", find_cuts(rows, duplicates.kept & ~held, config.dedup, work, board))
    known += _list_held_out(rows, held)
    items = _build_index(known, rows, config, work, board, "recount")
    decision = replace(decision, items=items)
    tally, reports = _decide(inputs, rows, decision, directory, board)
    if not tally.left.get(""):
        raise UserError(explain_empty(tally, config))
    if tally.overlap_after:
        raise RuntimeError(f"{tally.overlap_after} documents still hold evaluation items")
    if problems is not None:
        write_problems(problems, items, directory)
    _join_held_out(work, directory / "english_held_out.jsonl")
    _write_kept(inputs, work, directory / "kept.npy")
    clusters = _describe_duplicates(duplicates, held, np.load(directory / "kept.npy"))
    found = _describe_items(items, problems, config)
    write_json(directory / "funnel.json", describe(tally, clusters, found))
    seconds = round(sum(report["seconds"] for report in reports), 3)
    return summarise(tally) | _count_problems(problems) | {"decide_seconds": seconds}


def _compare(
    inputs: Inputs,
    index: Index,
    config: PrepareConfig,
    decision: Decision,
    work: Path,
    board: ProgressBoard,
) -> Duplicates:
    """Duplicates among the documents that may stay, and the arrays that `Fates` reads."""
    passes, scores = _judge(inputs, config, decision, work, board)
    settled = len(index) - len(passes)
    alive = np.concatenate([_earlier_kept(inputs, settled), passes])
    priority = np.full(len(index), SETTLED)
    priority[settled:] = _rank(index, settled, scores, config)
    found = find_duplicates(
        (*inputs.earlier, *inputs.stems), alive, priority, settled, config.dedup, work, board
    )
    save_duplicates(found, index, work)
    return found


def _judge(
    inputs: Inputs, config: PrepareConfig, decision: Decision, work: Path, board: ProgressBoard
) -> tuple[np.ndarray, np.ndarray | None]:
    """Which documents may stand for others, and their scores where `keep` needs them."""
    best = config.dedup.keep == "best"
    if best and config.signals.classifier is None:
        raise UserError(
            "prepare.dedup.keep=best: needs the scores of a classifier; give "
            "prepare.signals.classifier, or another rule"
        )
    if not len(decision.items.lengths) and not any(row["signals"] for row in inputs.files):
        return np.ones(sum(row["used"] for row in inputs.files), bool), None
    work_on = partial(judge_part, decision=decision, best=best)
    reports = run_parts("judge", inputs.files, work_on, work, board, stream=False)
    passes = np.concatenate([np.load(work / report["name"]) for report in reports])
    if not best:
        return passes, None
    return passes, np.concatenate([np.load(work / report["scores"]) for report in reports])


def _earlier_kept(inputs: Inputs, settled: int) -> np.ndarray:
    return np.ones(settled, bool) if inputs.earlier_kept is None else inputs.earlier_kept


def _rank(
    index: Index, settled: int, scores: np.ndarray | None, config: PrepareConfig
) -> np.ndarray:
    """Priority of each new document by the rule of who stays; int64, higher stays."""
    if config.dedup.keep == "longest":
        return index.facts("chars")[settled:].astype(np.int64)
    if config.dedup.keep == "oldest":
        return NO_DAY - index.facts("day")[settled:].astype(np.int64)
    if scores is not None:
        return np.round(scores.astype(np.float64) * 1e6).astype(np.int64)
    return np.zeros(len(index) - settled, np.int64)


def _hold_out(
    inputs: Inputs,
    index: Index,
    duplicates: Duplicates,
    share: float,
    seed: int,
    starts: np.ndarray,
) -> np.ndarray:
    """bool: the `share` of the documents that stay whose ids hash lowest, the textbook aside.

    At least one of two or more, unless the share is 0.
    """
    english = np.zeros(len(index), bool)
    for row, start in zip(inputs.files, starts, strict=False):
        english[start : start + row["used"]] = row["kind"] != TEXTBOOK
    rows = np.flatnonzero(english & duplicates.kept)
    held = np.zeros(len(index), bool)
    if share > 0 and len(rows) > 1:
        halves = index.facts("id").view("<u8").reshape(-1, 2)[rows]
        with np.errstate(over="ignore"):
            keys = (halves[:, 0] ^ np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15) ^ halves[:, 1]
            keys = (keys ^ (keys >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        chosen = np.argsort(keys ^ (keys >> np.uint64(29)), kind="stable")
        held[rows[chosen[: max(1, round(share * len(rows)))]]] = True
    return held


def _draw_problems(inputs: Inputs, config: PrepareConfig, seed: int) -> Problems | None:
    """Exercises, prompts and held-out problems, where a textbook is among the sources."""
    if not any(source.kind == TEXTBOOK for source in config.sources):
        return None
    return draw_problems(config.textbook, seed)


def _list_items(problems: Problems | None, config: PrepareConfig) -> list[Item]:
    """Evaluation sets, and every way to ask or state a held-out problem."""
    items = load_items(config.decontaminate)
    for problem in problems.held_out if problems else ():
        items += [Item(HELD_OUT, problem.key, needle) for needle in list_needles([problem])]
    return items


def _build_index(
    items: Sequence[Item],
    files: Files,
    config: PrepareConfig,
    work: Path,
    board: ProgressBoard,
    name: str,
) -> EvaluationIndex:
    """The index of `items`, without the n-grams that too many documents hold; `name` of a pass."""
    index = build_index(items, config.decontaminate.ngram)
    most = config.decontaminate.max_occurrences
    if most is None:
        return index
    return drop_common(index, count_occurrences(name, files, index, work, board), most)


def _list_held_out(rows: Files, held: np.ndarray) -> list[Item]:
    """The documents that are kept for evaluation."""
    items: list[Item] = []
    for row in rows:
        wanted = held[row["start"] : row["start"] + row["used"]]
        if not wanted.any():
            continue
        at = 0
        for table in read_batches(Path(row["file"]), ["doc_id", "text"]):
            mask = wanted[at : at + len(table)]
            chosen = table.slice(0, len(mask)).filter(pa.array(mask))
            for document in chosen.to_pylist():
                items.append(Item(HELD_OUT, document["doc_id"], document["text"]))
            at += len(table)
    return items


def _decide(
    inputs: Inputs, rows: Files, decision: Decision, directory: Path, board: ProgressBoard
) -> tuple[Tally, list[dict[str, Any]]]:
    work = partial(decide_part, decision=decision)
    tally = tally_reading(inputs.reading)
    reports = run_parts("decide", rows, work, directory, board, "part", "documents", stream=False)
    for report in reports:
        tally.merge(Tally(**report["tally"]))
    return tally, reports


def _join_held_out(work: Path, file: Path) -> None:
    with file.open("wb") as stream:
        for part in sorted(work.glob("held-*.jsonl")):
            stream.write(part.read_bytes())


def _write_kept(inputs: Inputs, work: Path, file: Path) -> None:
    """bool: which documents of the run's `signatures` stage were kept, for `dedup.against`."""
    marks = [np.load(work / f"kept-{row['number']:06d}.npy") for row in inputs.files]
    np.save(file, np.concatenate(marks))


def _describe_duplicates(
    duplicates: Duplicates, held: np.ndarray, kept: np.ndarray
) -> dict[str, Any]:
    """How many documents each kept one stands for, and what was compared.

    `orphaned` are duplicates of a document that went later itself, for what it held of evaluation
    texts or of others' passages.
    """
    stays = held | duplicates.alive
    stays[len(stays) - len(kept) :] = kept | held[len(stays) - len(kept) :]
    gone = np.flatnonzero(duplicates.kind != KEPT)
    sizes = np.bincount(duplicates.keeper[gone]) + 1
    values, counts = np.unique(sizes[sizes > 1], return_counts=True)
    return {
        "clusters": {str(v): int(c) for v, c in zip(values.tolist(), counts.tolist(), strict=True)},
        "candidates": duplicates.candidates,
        "verified": duplicates.verified,
        "orphaned": int((~stays[duplicates.keeper[gone]]).sum()),
    }


def _describe_items(
    items: EvaluationIndex, problems: Problems | None, config: PrepareConfig
) -> dict[str, Any]:
    return {
        "held_out": len(problems.held_out) if problems else 0,
        "ngram": config.decontaminate.ngram,
        "granularity": config.decontaminate.granularity,
        "method": config.decontaminate.method,
        "items": dict(sorted(Counter(task for task, _ in items.names).items())),
        "unused": dict(sorted(Counter(task for task, _ in items.unused).items())),
    }


def _count_problems(problems: Problems | None) -> dict[str, int]:
    if problems is None:
        return {}
    return {
        "exercises": len(problems.exercises),
        "prompts": len(problems.prompts),
        "held_out": len(problems.held_out),
    }


def list_files(
    documents: Path, reading: Sequence[Mapping[str, Any]], **columns: Sequence[Any]
) -> list[dict[str, Any]]:
    """Rows of `Files` for the parts of a `documents` stage that hold any document to use."""
    rows = []
    for number, report in enumerate(reading):
        if report["used"]:
            row = {
                "number": number,
                "file": str(documents / "documents" / f"part-{number:06d}.parquet"),
                "used": report["used"],
                "source": report["source"],
            }
            rows.append(row | {name: values[number] for name, values in columns.items()})
    return rows
