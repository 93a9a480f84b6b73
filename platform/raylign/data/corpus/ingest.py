"""First pass: slices of sources to documents, and to rejected records with their reasons."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raylign.config import PrepareConfig, TextbookConfig, UserError
from raylign.data.corpus.parts import run_parts
from raylign.data.documents import DOCUMENTS
from raylign.data.sources.rows import DAMAGED
from raylign.data.sources.slices import Slice, read_slice
from raylign.data.tables import TableWriter
from raylign.tracking import ProgressBoard

REJECTED = pa.schema(
    [
        ("source", pa.string()),
        ("origin", pa.string()),
        ("offset", pa.int64()),
        ("url", pa.string()),
        ("reason", pa.string()),
        ("excerpt", pa.large_string()),
    ]
)
"""A record that is no document: where it stood, why, and how it begins."""

# Small tables of the readers are joined until they hold so much: larger row groups compress better.
JOINED_ROWS = 8192
JOINED_BYTES = 16 << 20


def read_documents(
    slices: Sequence[Slice],
    config: PrepareConfig,
    seed: int,
    directory: Path,
    board: ProgressBoard,
) -> list[dict[str, Any]]:
    """Write `documents/` and `rejected/`; one report a slice. Ray must be joined.

    Raises `UserError` when no document was found, or more than `max_damaged_share` of a source's
    records cannot be read.
    """
    for name in ("documents", "rejected"):
        (directory / name).mkdir(exist_ok=True)
    rows = [{"number": part.index, **_as_row(part)} for part in slices]
    work = partial(read_part, textbook=config.textbook, seed=seed)
    reports = run_parts("read", rows, work, directory, board, "slice", "documents")
    _check_damage(slices, reports, config.max_damaged_share)
    _limit(slices, reports)
    if not any(report["used"] for report in reports):
        raise UserError(_explain_nothing(slices, reports))
    return reports


def _as_row(part: Slice) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(part).items() if name != "number"}


def read_part(
    row: Mapping[str, Any], directory: Path, textbook: TextbookConfig, seed: int
) -> dict[str, Any]:
    """Read one slice."""
    part = Slice(**{name: value for name, value in row.items() if name != "number"})
    name = f"part-{row['number']:06d}.parquet"
    reasons: Counter[str] = Counter()
    chars = size = 0
    with ExitStack() as stack:
        kept = _Sink(stack, directory / "documents" / name, DOCUMENTS)
        gone = _Sink(stack, directory / "rejected" / name, REJECTED)
        for table in read_slice(part, textbook, seed):
            good = pc.is_null(table["reason"])
            kept.write(table.filter(good).select(DOCUMENTS.names))
            bad = table.filter(pc.invert(good))
            reasons.update(bad["reason"].to_pylist())
            gone.write(_reject(bad))
        kept.flush()
        gone.flush()
        chars, size = kept.chars, kept.bytes
    files = [f"{sink.file.parent.name}/{name}" for sink in (kept, gone) if sink.rows]
    return {
        "source": part.source,
        "documents": kept.rows,
        "chars": chars,
        "bytes": size,
        "rejected": dict(sorted(reasons.items())),
        "files": files,
    }


def _reject(table: pa.Table) -> pa.Table:
    return table.rename_columns(
        ["excerpt" if name == "text" else name for name in table.schema.names]
    ).select(REJECTED.names)


class _Sink:
    """A file that is opened with its first row, so that there are no empty ones."""

    def __init__(self, stack: ExitStack, file: Path, schema: pa.Schema) -> None:
        self.file, self._stack, self._schema = file, stack, schema
        self._writer: TableWriter | None = None
        self._waiting: list[pa.Table] = []
        self.rows = self.chars = self.bytes = 0

    def write(self, table: pa.Table) -> None:
        if not table.num_rows:
            return
        self._waiting.append(table)
        self.rows += table.num_rows
        if "text" in self._schema.names:
            self.chars += pc.sum(pc.utf8_length(table["text"])).as_py()
            self.bytes += pc.sum(pc.binary_length(table["text"])).as_py()
        waiting = sum(part.num_rows for part in self._waiting)
        if waiting >= JOINED_ROWS or sum(part.nbytes for part in self._waiting) >= JOINED_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        if self._writer is None:
            self._writer = self._stack.enter_context(TableWriter(self.file, self._schema))
        self._writer.write(pa.concat_tables(self._waiting).cast(self._schema))
        self._waiting = []


def _check_damage(
    slices: Sequence[Slice], reports: Sequence[Mapping[str, Any]], limit: float
) -> None:
    for source in dict.fromkeys(part.source for part in slices):
        mine = [report for report in reports if report["source"] == source]
        reasons = sum((Counter(report["rejected"]) for report in mine), Counter[str]())
        damaged = Counter({reason: n for reason, n in reasons.items() if reason in DAMAGED})
        total = sum(report["documents"] for report in mine) + reasons.total()
        if damaged.total() > limit * total:
            reason, count = max(damaged.items(), key=lambda item: (item[1], item[0]))
            raise UserError(
                f"source {source!r}: {damaged.total()} of {total} records cannot be read, most "
                f"({count}) as {reason!r}; see them with --check, correct the source, or raise "
                f"prepare.max_damaged_share={limit}"
            )


def _limit(slices: Sequence[Slice], reports: Sequence[dict[str, Any]]) -> None:
    """Set how many of each part's documents are `used`: a source may be limited."""
    taken: Counter[str] = Counter()
    for part, report in zip(slices, reports, strict=True):
        room = part.limit - taken[part.source] if part.limit else report["documents"]
        report["used"] = max(0, min(report["documents"], room))
        taken[part.source] += report["used"]


def _explain_nothing(slices: Sequence[Slice], reports: Sequence[Mapping[str, Any]]) -> str:
    reasons = sum((Counter(report["rejected"]) for report in reports), Counter[str]())
    if not slices or not reasons:
        return "prepare.sources: no documents were found in any source; name others"
    reason, count = max(reasons.items(), key=lambda item: (item[1], item[0]))
    return (
        f"prepare.sources: none of {reasons.total()} records is a document; {count} were rejected "
        f"as {reason!r}; look with --check, and correct prepare.sources"
    )
