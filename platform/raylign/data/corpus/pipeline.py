"""The corpus: sources to documents, demonstrations and held-out problems, on Ray Data.

    slices ─▶ read ─▶ clean ─▶ judge ─▶ sign ─▶ row files        Ray Data, one task a slice
                                                   │
                       hashes, bands, sketches ────┘             one process: who duplicates whom,
                                │                                which texts are held out
                              fates
                                │
    row files ─▶ decide ─▶ documents/, excluded/, held-out texts  Ray Data, one task a part

Row-wise work is Ray Data's; what groups (duplicates) works on 240 bytes a document and never moves
text. Every file is a function of recipe and data: not of the number of workers or their order.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import xxhash

from raylign.config import PrepareConfig, UserError
from raylign.data.corpus import passes
from raylign.data.corpus.funnel import Tally, describe, explain_empty, summarise
from raylign.data.decontamination.index import Index, build_index, list_needles
from raylign.data.dedup.signatures import Signatures, find_duplicates
from raylign.data.sources.slices import TEXTBOOK, Slice
from raylign.data.textbook.arithmetic import Problem
from raylign.data.textbook.problems import draw_problems, write_problems
from raylign.run import write_json
from raylign.tracking import ProgressBoard

Pass = Callable[..., Any]
COMPARED = ["doc_id", "source", "stage", "hash", "bands", "sketch", "shingles"]
"""Columns of the row files that the search for duplicates needs: everything but text."""


@dataclass(frozen=True, slots=True, eq=False)
class Fates:
    """What becomes of each of N documents, in corpus order."""

    stages: np.ndarray
    """object [N]: where it leaves; "" for those that stay until decontamination."""
    duplicate_of: np.ndarray
    """object [N]: id of the document that stands for it, or None."""
    similarity: np.ndarray
    """float64 [N]: to that document; NaN without one."""


def build_corpus(
    slices: Sequence[Slice],
    config: PrepareConfig,
    seed: int,
    directory: Path,
    board: ProgressBoard,
) -> dict[str, Any]:
    """Write the corpus into `directory`; returns the numbers worth showing. Ray must be joined.

    `slices` are those of `sources.plan_slices`. Raises `UserError` when no document is left, and
    `RuntimeError` should a held-out item survive decontamination.
    """
    work = directory / "work"
    for folder in (work, directory / "documents", directory / "excluded"):
        folder.mkdir(parents=True)
    problems = draw_problems(config.textbook, seed)
    files = passes.group_files(_read(slices, config, seed, work, board))
    if not files:
        raise UserError("prepare.sources: no documents were found in any source; name others")
    table = passes.read_files(work, chain.from_iterable(files), COMPARED)
    fates = decide_fates(table, slices, config, seed)
    index = _index(problems.held_out, work, files, fates, config)
    tally = _decide(files, fates, config, index, directory, board)
    if not tally.left.get(""):
        raise UserError(explain_empty(tally, config))
    if tally.overlap_after:
        raise RuntimeError(f"{tally.overlap_after} documents still hold evaluation items")
    write_problems(problems, index, directory)
    _join_held_out(work, directory / "english_held_out.jsonl")
    write_json(directory / "funnel.json", describe(tally, problems, index, config))
    shutil.rmtree(work)
    return summarise(tally, problems)


def stream(
    rows: Sequence[dict[str, Any]],
    transforms: Sequence[Pass],
    board: ProgressBoard,
    name: str,
    unit: str,
    size: str | None = None,
) -> list[dict[str, Any]]:
    """Run every row through the table functions `transforms`, each row as a task of its own.

    Returns the rows that the last one made, in no particular order; each says in `number` which
    input row it came from. The bar counts input rows, and beside them the sum of a column `size`.
    """
    _quiet()
    if not rows:
        return []
    dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    for position, transform in enumerate(transforms):
        batch = 1 if position == 0 else None
        dataset = dataset.map_batches(
            transform, batch_size=batch, batch_format="pyarrow", zero_copy_batch=True
        )
    results: list[dict[str, Any]] = []
    done: set[int] = set()
    total = 0
    with board.bar(name, len(rows), unit) as bar:
        for result in dataset.iter_rows():
            results.append(result)
            done.add(result["number"])
            total += int(result[size]) if size else 0
            bar.update(len(done), note=f"{total:,} {size}" if size else "")
        bar.update(len(rows), note=f"{total:,} {size}" if size else "")
    return results


def _quiet() -> None:
    """Ray Data's own bars and plans stay in its log file; the board shows progress."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.get_name() == "console":
            handler.setLevel(logging.ERROR)


def _read(
    slices: Sequence[Slice], config: PrepareConfig, seed: int, work: Path, board: ProgressBoard
) -> list[str]:
    """First pass; the names of the row files."""
    transforms: list[Pass] = [
        partial(passes.read_rows, textbook=config.textbook, seed=seed),
        passes.clean_rows,
        partial(passes.judge_rows, config=config.quality),
        partial(passes.sign_rows, config=config.dedup),
        partial(passes.write_rows, directory=str(work)),
    ]
    rows = [dataclasses.asdict(part) for part in slices]
    written = stream(rows, transforms, board, "read", "slice", "rows")
    return [row["name"] for row in written]


def decide_fates(
    table: pa.Table, slices: Sequence[Slice], config: PrepareConfig, seed: int
) -> Fates:
    """Limits, duplicates and the English held-out share."""
    stages = np.array(table["stage"].to_pylist(), object)
    ids = np.array(table["doc_id"].to_pylist(), object)
    sources = np.array(table["source"].to_pylist(), object)
    for label, limit in {part.source: part.limit for part in slices}.items():
        rows = np.flatnonzero(sources == label)
        stages[rows[_beyond(limit, stages[rows] != "read")]] = "over_limit"
    duplicate_of = np.full(len(ids), None, object)
    similarity = np.full(len(ids), np.nan)
    alive = np.flatnonzero(stages == "")
    found = find_duplicates(*_comparable(table, alive, config), config.dedup)
    gone = ~found.kept
    stages[alive[gone]] = np.where(found.exact[gone], "exact_duplicates", "near_duplicates")
    duplicate_of[alive[gone]] = ids[alive[found.keeper[gone]]]
    similarity[alive[gone]] = found.similarity[gone]
    textbooks = [part.source for part in slices if part.kind == TEXTBOOK]
    english = np.flatnonzero((stages == "") & ~np.isin(sources, textbooks))
    stages[_draw_share(ids, english, config.english_held_out_share, seed)] = "english_held_out"
    return Fates(stages, duplicate_of, similarity)


def _beyond(limit: int, readable: np.ndarray) -> np.ndarray:
    """bool: the rows after the `limit`-th readable one; none when `limit` is 0."""
    before = np.cumsum(readable) - readable
    return before >= limit if limit else np.zeros(len(readable), bool)


def _comparable(
    table: pa.Table, rows: np.ndarray, config: PrepareConfig
) -> tuple[np.ndarray, Signatures]:
    """Hashes and signatures of the given rows."""
    part = table.select(["hash", "bands", "sketch", "shingles"]).take(pa.array(rows))
    bands = passes.from_binary(part["bands"], np.uint64, config.dedup.bands)
    width = config.dedup.bands * config.dedup.rows
    sketches = passes.from_binary(part["sketch"], np.uint8, width)
    hashes = np.array(part["hash"].to_pylist(), "S16")
    return hashes, Signatures(bands, sketches, part["shingles"].to_numpy())


def _draw_share(ids: np.ndarray, rows: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The `share` of `rows` whose ids hash lowest: at least one of two or more, unless it is 0."""
    if share == 0 or len(rows) < 2:
        return rows[:0]
    hashes = np.array(
        [xxhash.xxh3_64_intdigest(f"{seed}/{ids[row]}".encode()) for row in rows], "u8"
    )
    return rows[np.argsort(hashes, kind="stable")[: max(1, round(share * len(rows)))]]


def _index(
    held_out: Sequence[Problem],
    work: Path,
    files: Sequence[Sequence[str]],
    fates: Fates,
    config: PrepareConfig,
) -> Index:
    """Everything that training may not see: held-out problems and held-out English texts."""
    items = list_needles(held_out)
    for names, rows in _split(work, files, fates):
        wanted = np.flatnonzero(fates.stages[rows] == "english_held_out")
        if len(wanted):
            texts = passes.read_files(work, names, ["text"])["text"]
            items += texts.take(pa.array(wanted)).to_pylist()
    return build_index(items, config.decontaminate.ngram)


def _split(
    work: Path, files: Sequence[Sequence[str]], fates: Fates
) -> Iterator[tuple[Sequence[str], slice]]:
    """(row files of one part, its documents in corpus order)."""
    start = 0
    for names in files:
        stop = start + sum(pq.read_metadata(work / name).num_rows for name in names)
        yield names, slice(start, stop)
        start = stop
    assert start == len(fates.stages)


def _decide(
    files: Sequence[Sequence[str]],
    fates: Fates,
    config: PrepareConfig,
    index: Index,
    directory: Path,
    board: ProgressBoard,
) -> Tally:
    """Second pass; what it counted."""
    work = directory / "work"
    parts = [
        {
            "number": number,
            "names": list(names),
            "stage": fates.stages[rows].tolist(),
            "duplicate_of": fates.duplicate_of[rows].tolist(),
            "similarity": [None if np.isnan(s) else float(s) for s in fates.similarity[rows]],
        }
        for number, (names, rows) in enumerate(_split(work, files, fates))
    ]
    transform = partial(
        passes.decide_rows,
        directory=str(directory),
        work=str(work),
        index=index,
        config=config.decontaminate,
    )
    results = stream(parts, [transform], board, "decide", "part")
    tally = Tally()
    for result in sorted(results, key=lambda row: row["number"]):
        tally.merge(Tally(**json.loads(result["tally"])))
    return tally


def _join_held_out(work: Path, file: Path) -> None:
    with file.open("wb") as stream_out:
        for part in sorted(work.glob("*.held.jsonl")):
            stream_out.write(part.read_bytes())
