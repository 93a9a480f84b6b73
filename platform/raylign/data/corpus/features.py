"""Second passes: what is measured of every document, and its signatures; texts are only read.

Both are rows beside the documents, in their order. Neither depends on a threshold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from raylign.config import DedupConfig, SignalsConfig
from raylign.data.corpus.parts import run_parts
from raylign.data.dedup.index import NO_DAY, make_facts, write_part
from raylign.data.dedup.signatures import Signatures, sign
from raylign.data.documents import read_batches
from raylign.data.quality.signals import measure
from raylign.data.tables import TableWriter
from raylign.tracking import ProgressBoard

Files = Sequence[Mapping[str, Any]]
"""Rows with `number`, `file` (of documents) and `used` (so many of its first documents)."""


def measure_documents(
    files: Files, config: SignalsConfig, directory: Path, board: ProgressBoard
) -> list[dict[str, Any]]:
    """Write a file of signals for every file of documents; one report each."""
    work = partial(measure_part, config=config)
    return run_parts("measure", files, work, directory, board, "part", "documents")


def measure_part(row: Mapping[str, Any], directory: Path, config: SignalsConfig) -> dict[str, Any]:
    """Signals of one file, with `doc_id` first."""
    name = f"part-{row['number']:06d}.parquet"
    writer: TableWriter | None = None
    with ExitStack() as stack:
        for table in _read(row, ["doc_id", "url", "text"]):
            signals = measure(table, config).add_column(0, "doc_id", table["doc_id"])
            writer = writer or stack.enter_context(TableWriter(directory / name, signals.schema))
            writer.write(signals)
    return {"documents": writer.rows if writer else 0, "files": [name] if writer else []}


def sign_documents(
    files: Files, config: DedupConfig, directory: Path, board: ProgressBoard
) -> list[dict[str, Any]]:
    """Write an index part for every file of documents; one report each."""
    work = partial(sign_part, config=config)
    return run_parts("sign", files, work, directory, board, "part", "documents", stream=False)


def sign_part(row: Mapping[str, Any], directory: Path, config: DedupConfig) -> dict[str, Any]:
    """Signatures of one file."""
    signed: list[Signatures] = []
    ids: list[str] = []
    chars, days = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for table in _read(row, ["doc_id", "date", "text"]):
        signed.append(sign(table["text"], config))
        ids += _as_hex(table["doc_id"])
        chars.append(pc.fill_null(pc.utf8_length(table["text"]), 0).to_numpy())
        days.append(_read_days(table["date"]))
    together = Signatures(
        *(np.concatenate([getattr(s, name) for s in signed]) for name in Signatures.__slots__)
    )
    facts = make_facts(ids, together, np.concatenate(chars), np.concatenate(days))
    names = write_part(directory / f"part-{row['number']:06d}", together, facts)
    return {"documents": len(ids), "files": names}


def _read(row: Mapping[str, Any], columns: list[str]) -> Iterator[pa.Table]:
    """Tables of the row's file, until `used` documents were seen."""
    left = row["used"]
    for table in read_batches(Path(row["file"]), columns):
        if left <= 0:
            return
        yield table.slice(0, left)
        left -= len(table)


def _as_hex(ids: pa.ChunkedArray) -> list[str]:
    """The ids themselves where they are of our form; hashes of the others."""
    ours = pc.all(pc.match_substring_regex(ids, "^[0-9a-f]{32}$")).as_py()
    values = ids.to_pylist()
    if ours:
        return values
    hexadecimal = re.compile("[0-9a-f]{32}")
    return [
        value if hexadecimal.fullmatch(value) else xxhash.xxh3_128_hexdigest(value.encode())
        for value in values
    ]


def _read_days(dates: pa.ChunkedArray) -> np.ndarray:
    """Days since 1970 of ISO dates; `NO_DAY` for what is none."""
    days = np.full(len(dates), NO_DAY, np.int32)
    if dates.null_count == len(dates):
        return days
    for position, value in enumerate(dates.to_pylist()):
        if value:
            try:
                days[position] = (date.fromisoformat(value[:10]) - date(1970, 1, 1)).days
            except ValueError:
                continue
    return days
