"""Documents that left, to be looked at: pairs of duplicates, evaluation items, rejected records.

Columns of numbers and names are scanned, a file at a time; texts are read of the few rows that are
shown. Which those are depends on the files alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raylign.data.report.differences import EXCERPT_CHARS, compare
from raylign.data.report.material import Material

PLACE = ("doc_id", "source", "origin", "url")
EXACT_PAIRS = 1
LEAST_PAIRS, MIDDLE_PAIRS, MOST_PAIRS = 4, 2, 1
"""Pairs of near duplicates that are shown: the least similar say whether the threshold fits."""
ITEMS_A_TASK = 3
# Documents with evaluation items whose details are parsed.
_DETAILS = 10_000
REJECTED_A_REASON = 3
SIMILARITY_BINS = 20

Row = tuple[int, int]
"""A file by number, and a row of it."""


def gather_duplicates(material: Material) -> dict[str, Any]:
    """`pairs` to compare, and `similarity`: near duplicates in bins of 0.05 from 0 to 1."""
    files = material.list_parts("corpus", "excluded")
    near, exact, counts = _scan_duplicates(files)
    chosen = [*_spread(near), *exact[:EXACT_PAIRS]]
    rows = list(read_rows(files, chosen, [*PLACE, "stage", "text", "duplicate_of", "similarity"]))
    keepers = find_documents(material, {row["duplicate_of"] for row in rows})
    pairs = [_pair(row, keepers.get(row["duplicate_of"])) for row in rows]
    return {"pairs": pairs, "similarity": counts.tolist()}


def _scan_duplicates(files: Sequence[Path]) -> tuple[list[tuple[float, Row]], list[Row], Any]:
    near: list[tuple[float, Row]] = []
    exact: list[Row] = []
    counts = np.zeros(SIMILARITY_BINS, np.int64)
    for number, file in enumerate(files):
        table = pq.read_table(file, columns=["stage", "similarity"])
        stage = table["stage"].combine_chunks()
        rows = np.flatnonzero(pc.equal(stage, "near_duplicates").to_numpy(zero_copy_only=False))
        values = table["similarity"].to_numpy()[rows]
        # A similarity of 0.70 in single precision is a little less than that.
        places = np.clip(((values + 1e-6) * SIMILARITY_BINS).astype(int), 0, SIMILARITY_BINS - 1)
        counts += np.bincount(places, minlength=SIMILARITY_BINS)
        # Only the extremes and the middle of each file can be chosen: memory stays small.
        own = sorted(zip(values.tolist(), ((number, int(row)) for row in rows), strict=True))
        near += own if len(own) < 64 else [*own[:16], *own[:: len(own) // 16], *own[-16:]]
        if len(exact) < EXACT_PAIRS:
            same = pc.equal(stage, "exact_duplicates").to_numpy(zero_copy_only=False)
            exact += [(number, int(row)) for row in np.flatnonzero(same)[:EXACT_PAIRS]]
    return sorted(set(near)), exact, counts


def _spread(near: Sequence[tuple[float, Row]]) -> list[Row]:
    """The least similar pairs, some from the middle, and the most similar."""
    size = len(near)
    if size <= LEAST_PAIRS + MIDDLE_PAIRS + MOST_PAIRS:
        return [row for _, row in near]
    middle = LEAST_PAIRS + (size - LEAST_PAIRS - MOST_PAIRS) // 2
    low = max(LEAST_PAIRS, middle - MIDDLE_PAIRS // 2)
    places = [
        *range(LEAST_PAIRS),
        *range(low, min(low + MIDDLE_PAIRS, size - MOST_PAIRS)),
        *range(size - MOST_PAIRS, size),
    ]
    return [near[place][1] for place in places]


def _pair(row: Mapping[str, Any], keeper: Mapping[str, Any] | None) -> dict[str, Any]:
    left, right = compare(row["text"], keeper["text"] if keeper else "")
    shown = {name: row[name] for name in PLACE}
    return {
        "stage": row["stage"],
        "similarity": None if row["similarity"] is None else round(row["similarity"], 3),
        "duplicate_of": row["duplicate_of"],
        "dropped": shown | {"chars": len(row["text"])} | asdict(left),
        "kept": None
        if keeper is None
        else {name: keeper[name] for name in (*PLACE, "where")}
        | {"chars": len(keeper["text"])}
        | asdict(right),
    }


def read_rows(
    files: Sequence[Path], rows: Iterable[Row], columns: list[str]
) -> Iterator[dict[str, Any]]:
    """Those rows, in their order; only the row groups that hold them are read."""
    for number, row in rows:
        with pq.ParquetFile(files[number]) as reader:
            at = 0
            for group in range(reader.num_row_groups):
                size = reader.metadata.row_group(group).num_rows
                if row < at + size:
                    table = reader.read_row_group(group, columns=columns)
                    yield table.slice(row - at, 1).to_pylist()[0]
                    break
                at += size


def find_documents(material: Material, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Documents by id, with `where` they are: kept, dropped later, held out, or in an earlier run.

    The text is that of the kept document where there is one, as it was kept.
    """
    places = [
        ("kept", material.root / "corpus" / "documents"),
        ("dropped later", material.root / "corpus" / "excluded"),
        ("held out for evaluation", material.root / "documents" / "documents"),
    ]
    for path in material.prepare("corpus").get("dedup", {}).get("against", []):
        places.append((f"kept in {path}", Path(path) / "corpus" / "documents"))
    found: dict[str, dict[str, Any]] = {}
    for where, directory in places:
        missing = pa.array(sorted(wanted - found.keys()), pa.string())
        if not len(missing):
            break
        for row in _look_up(sorted(directory.glob("*.parquet")), missing):
            found.setdefault(row["doc_id"], row | {"where": where})
    return found


def _look_up(files: Iterable[Path], ids: pa.Array) -> Iterator[dict[str, Any]]:
    for file in files:
        with pq.ParquetFile(file) as reader:
            for group in range(reader.num_row_groups):
                column = reader.read_row_group(group, columns=["doc_id"])["doc_id"]
                mask = pc.is_in(column, value_set=ids)
                if pc.any(mask).as_py():
                    table = reader.read_row_group(group, columns=[*PLACE, "text"])
                    yield from table.filter(mask).to_pylist()


def gather_evaluation_items(material: Material) -> dict[str, list[dict[str, Any]]]:
    """By task: passages that held an item in documents that went, different items first."""
    shown: dict[str, list[dict[str, Any]]] = {}
    seen: set[tuple[str, str]] = set()
    left = _DETAILS
    for file in material.list_parts("corpus", "excluded"):
        with pq.ParquetFile(file) as reader:
            for batch in reader.iter_batches(8192, columns=[*PLACE, "stage", "details"]):
                mask = pc.and_(
                    pc.equal(batch["stage"], "decontaminate"), batch["details"].is_valid()
                )
                for row in batch.filter(mask).to_pylist():
                    if not left:
                        return dict(sorted(shown.items()))
                    left -= 1
                    for hit in json.loads(row["details"]).get("evaluation_items", []):
                        key = (hit["task"], hit["item"])
                        if key in seen or len(shown.get(hit["task"], ())) >= ITEMS_A_TASK:
                            continue
                        seen.add(key)
                        place = {name: row[name] for name in PLACE}
                        shown.setdefault(hit["task"], []).append(place | hit)
    return dict(sorted(shown.items()))


def gather_rejected(material: Material) -> list[dict[str, Any]]:
    """The first records of each source and reason, with file and offset."""
    wanted: dict[tuple[str, str], int] = {}
    for _, report in material.list_used():
        for reason in report["rejected"]:
            wanted[report["source"], reason] = REJECTED_A_REASON
    rows: list[dict[str, Any]] = []
    for number, report in material.list_used():
        file = material.root / "documents" / "rejected" / f"part-{number:06d}.parquet"
        source = report["source"]
        if not file.is_file() or not any(wanted[source, r] for r in report["rejected"]):
            continue
        reasons = pq.read_table(file, columns=["reason"])["reason"].to_pylist()
        chosen: list[Row] = []
        for row, reason in enumerate(reasons):
            if wanted.get((source, reason), 0):
                wanted[source, reason] -= 1
                chosen.append((0, row))
        columns = ["source", "origin", "offset", "url", "reason", "excerpt"]
        for found in read_rows([file], chosen, columns):
            found["excerpt"] = (found["excerpt"] or "")[:EXCERPT_CHARS]
            rows.append(found)
    return sorted(rows, key=lambda row: (row["reason"], row["source"]))
