"""The two passes over a corpus, as functions from tables to tables that `corpus` gives to Ray Data.

The first pass reads, cleans, judges and signs documents, and leaves *row files*. Between the passes
the duplicates are found. The second pass knows every document's fate and writes what is kept and
what is excluded. A row file's name and bytes depend on its documents alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raylign.config import DecontaminateConfig, DedupConfig, QualityConfig, TextbookConfig
from raylign.data.corpus.funnel import Tally
from raylign.data.decontamination.index import Index, overlapping, remove_lines
from raylign.data.dedup.signatures import hash_text, sign
from raylign.data.extraction.text import clean_text
from raylign.data.quality import rules as quality
from raylign.data.sources.slices import Slice, read_slice

DOCUMENTS = pa.schema(
    [
        ("doc_id", pa.string()),
        ("source", pa.string()),
        ("text", pa.string()),
        ("origin", pa.string()),
    ]
)
EXCLUDED = pa.schema(
    [
        ("doc_id", pa.string()),
        ("source", pa.string()),
        ("text", pa.string()),
        ("stage", pa.string()),
        ("reasons", pa.list_(pa.string())),
        ("duplicate_of", pa.string()),
        ("similarity", pa.float32()),
        ("origin", pa.string()),
    ]
)


def read_rows(slices: pa.Table, textbook: TextbookConfig, seed: int) -> Iterator[pa.Table]:
    """Documents of each slice (a row of `Slice`), as tables of `sources.SCHEMA` with a `stage`."""
    for row in slices.to_pylist():
        for table in read_slice(Slice(**row), textbook, seed):
            stages = ["read" if reasons else "" for reasons in table["reasons"].to_pylist()]
            yield table.append_column("stage", pa.array(stages, pa.string()))


def clean_rows(table: pa.Table) -> pa.Table:
    """Clean every accepted text; one of which nothing is left is rejected."""
    texts, stages, reasons = _columns(table, "text", "stage", "reasons")
    for row, stage in enumerate(stages):
        if not stage:
            texts[row] = clean_text(texts[row])
            if not texts[row]:
                stages[row], reasons[row] = "clean", ["empty"]
    return _replace(table, text=texts, stage=stages, reasons=reasons)


def judge_rows(table: pa.Table, config: QualityConfig) -> pa.Table:
    """Reject what fails the quality heuristics, with all reasons."""
    texts, stages, reasons = _columns(table, "text", "stage", "reasons")
    for row, stage in enumerate(stages):
        if not stage:
            found = quality.list_reasons(quality.measure(texts[row]), config)
            if found:
                stages[row], reasons[row] = "quality", found
    return _replace(table, stage=stages, reasons=reasons)


def sign_rows(table: pa.Table, config: DedupConfig) -> pa.Table:
    """Add what the search for duplicates needs: `hash`, `bands`, `sketch` and `shingles`."""
    signatures = sign(table["text"], config)
    columns = {
        "hash": pa.array([hash_text(text) for text in table["text"].to_pylist()], pa.binary(16)),
        "bands": _to_binary(signatures.bands),
        "sketch": _to_binary(signatures.sketches),
        "shingles": pa.array(signatures.shingles),
    }
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


def write_rows(table: pa.Table, directory: str) -> pa.Table:
    """Write a row file for each batch of `read_slice` in `table`.

    On their way here Ray Data may join tables, or split them. A file never holds parts of two
    batches, and its name says which batch and from which document on, so that `group_files` can
    put the batches together again. Returns `number` (of the slice), `name` and `rows`.
    """
    results: dict[str, list[Any]] = {"number": [], "name": [], "rows": []}
    keys = table.select(["slice", "batch"]).to_pylist()
    starts = [row for row, key in enumerate(keys) if row == 0 or key != keys[row - 1]]
    for start, stop in zip(starts, [*starts[1:], table.num_rows], strict=True):
        part, number = table.slice(start, stop - start), keys[start]["slice"]
        place = f"{number:06d}-{keys[start]['batch']:012d}-{part['position'][0].as_py():012d}"
        name = f"rows-{place}.parquet"
        write_parquet(part, Path(directory, name))
        for column, value in (("number", number), ("name", name), ("rows", part.num_rows)):
            results[column].append(value)
    return pa.table(results)


def group_files(names: Iterable[str]) -> list[list[str]]:
    """Row files in corpus order, those of one batch together."""
    return [list(group) for _, group in groupby(sorted(names), key=lambda n: n.rpartition("-")[0])]


def decide_rows(
    parts: pa.Table, directory: str, work: str, index: Index, config: DecontaminateConfig
) -> pa.Table:
    """Write kept, excluded and held-out documents of each part of the corpus.

    `parts` has `number`, `names` (row files) and, one entry a document, `stage` ("" for kept),
    `duplicate_of` and `similarity`. Returns `number` and the part's `Tally` as JSON.
    """
    numbers, tallies = [], []
    for part in parts.to_pylist():
        tally = _decide_part(part, Path(directory), Path(work), index, config)
        numbers.append(part["number"])
        tallies.append(json.dumps(vars(tally), sort_keys=True))
    return pa.table({"number": numbers, "tally": tallies})


def read_files(work: Path, names: Iterable[str], columns: list[str]) -> pa.Table:
    """Columns of row files, one after the other."""
    return pa.concat_tables([pq.read_table(work / name, columns=columns) for name in names])


def _decide_part(
    part: dict[str, Any], directory: Path, work: Path, index: Index, config: DecontaminateConfig
) -> Tally:
    columns = ["doc_id", "source", "origin", "text", "reasons"]
    rows = read_files(work, part["names"], columns).to_pylist()
    tally = Tally()
    kept: list[dict[str, Any]] = []
    excluded: list[dict[str, Any]] = []
    held: list[dict[str, Any]] = []
    for row, stage, other, similarity in zip(
        rows, part["stage"], part["duplicate_of"], part["similarity"], strict=True
    ):
        if not stage:
            kept.append(row)
        elif stage != "over_limit":
            reasons = row["reasons"] or [stage.removesuffix("s")]
            tally.drop(stage, reasons, row["source"], row["text"])
            outcome = {"stage": stage, "reasons": reasons, "duplicate_of": other}
            gone = held if stage == "english_held_out" else excluded
            gone.append(row | outcome | {"similarity": similarity})
    kept, contaminated = _decontaminate(kept, index, config, tally)
    for row in kept:
        tally.keep(row["source"], len(row["text"]))
    tally.overlap_after = len(overlapping([row["text"] for row in kept], index))
    name = f"part-{part['number']:05d}"
    _write_part(kept, DOCUMENTS, directory / "documents" / f"{name}.parquet")
    _write_part(excluded + contaminated, EXCLUDED, directory / "excluded" / f"{name}.parquet")
    texts = [json.dumps({"text": row["text"]}, ensure_ascii=False) + "\n" for row in held]
    (work / f"{name}.held.jsonl").write_text("".join(texts), encoding="utf-8")
    return tally


def _decontaminate(
    rows: list[dict[str, Any]], index: Index, config: DecontaminateConfig, tally: Tally
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(kept, excluded) rows; kept ones hold no evaluation item any more."""
    texts = [row["text"] for row in rows]
    kept: list[dict[str, Any]] = []
    excluded: list[dict[str, Any]] = []
    cleaned = remove_lines(texts, index) if config.granularity == "line" else {}
    found = set(cleaned or overlapping(texts, index))
    for position, row in enumerate(rows):
        if position not in found:
            kept.append(row)
            continue
        shorter = cleaned.get(position)
        if shorter is not None and 2 * len(shorter.text) >= len(row["text"]):
            kept.append(row | {"text": shorter.text})
            tally.documents_shortened += 1
            tally.lines_removed += len(shorter.removed)
            tally.show("held_out_line", row["source"], shorter.removed[0])
        else:
            tally.drop("decontaminate", ["held_out"], row["source"], row["text"])
            outcome = {"stage": "decontaminate", "reasons": ["held_out"]}
            excluded.append(row | outcome | {"duplicate_of": None, "similarity": None})
    return kept, excluded


def _write_part(rows: list[dict[str, Any]], schema: pa.Schema, file: Path) -> None:
    if rows:
        columns = {f.name: pa.array([row[f.name] for row in rows], f.type) for f in schema}
        write_parquet(pa.table(columns, schema=schema), file)


def write_parquet(table: pa.Table, file: Path) -> None:
    """Write with fixed options, so that equal tables give equal bytes, and appear whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    pq.write_table(
        table,
        temporary,
        compression="zstd",
        compression_level=3,
        row_group_size=65_536,
        version="2.6",
        use_dictionary=["source"] if "source" in table.schema.names else False,
        store_schema=True,
    )
    os.replace(temporary, file)


def _columns(table: pa.Table, *names: str) -> list[list[Any]]:
    return [table[name].to_pylist() for name in names]


def _replace(table: pa.Table, **columns: list[Any]) -> pa.Table:
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        kind = table.schema.field(name)
        table = table.set_column(at, kind, pa.array(values, kind.type))
    return table


def _to_binary(rows: np.ndarray) -> pa.Array:
    """A contiguous 2-D array as fixed-size binary, one value a row."""
    width = rows.shape[1] * rows.itemsize
    buffer = pa.py_buffer(np.ascontiguousarray(rows))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, buffer])


def from_binary(column: pa.ChunkedArray, dtype: type, width: int) -> np.ndarray:
    """The inverse: [rows, width] of `dtype`."""
    chunks = [
        np.frombuffer(c.buffers()[1], np.uint8)[c.offset * c.type.byte_width :][
            : len(c) * c.type.byte_width
        ]
        for c in column.chunks
        if len(c)
    ]
    body = np.concatenate(chunks) if chunks else np.empty(0, np.uint8)
    return body.view(dtype).reshape(-1, width)
