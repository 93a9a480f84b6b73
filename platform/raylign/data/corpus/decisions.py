"""Last pass: every document stays or goes, and both are written down.

Thresholds are applied to signals that were measured before; duplicates and held-out documents are
known; evaluation items are looked for in what is left. A document that goes keeps all reasons of
the step at which it went, the document that stands for it, and how similar that is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raylign.config import DecontaminateConfig, PiiConfig, QualityConfig
from raylign.data.corpus.batch import Batch
from raylign.data.corpus.duplicates import Fates
from raylign.data.corpus.funnel import Tally
from raylign.data.decontamination.index import Index as EvaluationIndex
from raylign.data.decontamination.removal import decontaminate
from raylign.data.documents import DOCUMENTS, read_batches
from raylign.data.quality.rules import judge
from raylign.data.tables import TableWriter

EXCLUDED = pa.schema(
    [
        *DOCUMENTS,
        ("stage", pa.string()),
        ("reasons", pa.list_(pa.string())),
        ("duplicate_of", pa.string()),
        ("similarity", pa.float32()),
        ("details", pa.string()),
    ]
)
"""A document that went. `duplicate_of`: id of the document that stands for it, in this corpus or in
one of `dedup.against`; `similarity`: estimated Jaccard similarity to that one; `details`: JSON of
what was found (evaluation items), or null."""


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What every part needs to know."""

    quality: QualityConfig
    decontaminate: DecontaminateConfig
    items: EvaluationIndex
    pii: PiiConfig


def decide_part(row: Mapping[str, Any], directory: Path, decision: Decision) -> dict[str, Any]:
    """Write what is kept, excluded and held out of one file of documents.

    `row` has `number`, `file`, `used`, `start` (its first document among all), `signals` (a file,
    or "") and `quality` (the source's own rules as JSON, or null). Reports a `Tally`.
    """
    fates = Fates.load(directory / ".work", row["start"], row["used"])
    tally = Tally()
    name = f"part-{row['number']:06d}"
    held: list[str] = []
    kept = np.zeros(row["used"], bool)
    writers: dict[str, TableWriter] = {}
    with ExitStack() as stack:
        for at, table, signals in _read(row):
            batch = Batch(table, signals)
            batch.judge(_judge(row, signals, decision.quality, len(table)))
            batch.follow(fates, at)
            held += batch.texts("english_held_out")
            batch.cut(fates, at)
            batch.decontaminate(decision.items, decision.decontaminate)
            batch.scrub(decision.pii)
            kept[at : at + len(table)] = batch.stays
            for folder, part in zip(("documents", "excluded"), batch.split(EXCLUDED), strict=True):
                if len(part) and folder not in writers:
                    file = directory / folder / f"{name}.parquet"
                    writers[folder] = stack.enter_context(TableWriter(file, part.schema))
                if len(part):
                    writers[folder].write(part)
            batch.count(decision.items, tally)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in held]
    held_out = directory / ".work" / f"held-{row['number']:06d}.jsonl"
    held_out.write_text("".join(lines), encoding="utf-8")
    np.save(directory / ".work" / f"kept-{row['number']:06d}.npy", kept)
    files = [f"{folder}/{name}.parquet" for folder in sorted(writers)]
    return {"documents": int(kept.sum()), "files": files, "tally": vars(tally)}


def judge_part(
    row: Mapping[str, Any], directory: Path, decision: Decision, best: bool
) -> dict[str, Any]:
    """Write which documents of one file may stand for others, and with `best` their scores.

    Those may that pass the rules and that evaluation items will not take out: a document must not
    go for one that goes itself. `row` is that of `decide_part`. Reports the `name` of a bool [n]
    file, and with `best` the `scores` in a float32 [n] one.
    """
    passes, scores = [np.empty(0, bool)], [np.empty(0, np.float32)]
    columns = ["text"] if len(decision.items.lengths) else ["doc_id"]
    for _, table, signals in _read(row, columns):
        reasons = _judge(row, signals, decision.quality, len(table))
        good = np.array([not found for found in reasons], bool)
        if len(decision.items.lengths):
            verdicts = decontaminate(table["text"], decision.items, decision.decontaminate)
            good[[place for place, verdict in verdicts.items() if verdict.text is None]] = False
        passes.append(good)
        if best and signals is not None:
            scores.append(signals["education_score"].to_numpy().astype(np.float32))
    name = f"passes-{row['number']:06d}.npy"
    np.save(directory / name, np.concatenate(passes))
    report: dict[str, Any] = {"name": name, "files": [name]}
    if best:
        np.save(directory / f"score-{name}", np.concatenate(scores))
        report |= {"scores": f"score-{name}", "files": [name, f"score-{name}"]}
    return report


def _judge(
    row: Mapping[str, Any], signals: pa.Table | None, quality: QualityConfig, size: int
) -> list[list[str]]:
    if signals is None:
        return [[] for _ in range(size)]
    own = row.get("quality")
    return judge(signals, QualityConfig.model_validate(own) if own else quality)


def _read(
    row: Mapping[str, Any], columns: list[str] | None = None
) -> Iterator[tuple[int, pa.Table, pa.Table | None]]:
    """(first row, documents, their signals) in tables of bounded size."""
    signals = _Aligned(row["signals"]) if row["signals"] else None
    at = 0
    for table in read_batches(Path(row["file"]), columns or DOCUMENTS.names):
        table = table.slice(0, row["used"] - at)
        if not len(table):
            return
        yield at, table, signals.take(len(table)) if signals else None
        at += len(table)


class _Aligned:
    """A file read in tables of any length that is asked for."""

    def __init__(self, file: str) -> None:
        self._batches = pq.ParquetFile(file).iter_batches(8192)
        self._rest: pa.Table | None = None

    def take(self, rows: int) -> pa.Table:
        """The next `rows` rows."""
        pieces = [] if self._rest is None else [self._rest]
        while sum(len(piece) for piece in pieces) < rows:
            pieces.append(pa.Table.from_batches([next(self._batches)]))
        table = pa.concat_tables(pieces)
        self._rest = table.slice(rows)
        return table.slice(0, rows)
