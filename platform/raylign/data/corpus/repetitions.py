"""Lines and passages that occur in several documents, found on Ray Data.

    lines:     hashes of lines a part ─▶ groups a range of hashes ──────────────┐
    passages:  words and anchors a part ─▶ pairs a range of anchors ─▶ extended ┴─▶ spans to cut

Only what is kept so far takes part. As elsewhere, tasks are cut by the amount of data alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylign.config import DedupConfig, LinesConfig
from raylign.data.corpus.features import Files
from raylign.data.corpus.parts import run_parts
from raylign.data.corpus.ranges import cut_keys, find_range, save
from raylign.data.dedup.groups import choose, group
from raylign.data.dedup.lines import find_repeated, split_lines
from raylign.data.dedup.substrings import extend, find_anchors
from raylign.data.documents import read_batches
from raylign.data.words import split_words
from raylign.tracking import ProgressBoard

Row = Mapping[str, Any]


def find_cuts(
    files: Files, kept: np.ndarray, config: DedupConfig, directory: Path, board: ProgressBoard
) -> np.ndarray:
    """Byte spans to cut: int64 [C, 3] of document, first byte and end, ascending and disjoint.

    `kept` is bool, a document each; `directory` holds `priority.npy`. Ray must be joined.
    """
    np.save(directory / "standing.npy", kept)
    found = [np.empty((0, 3), np.int64)]
    if config.lines is not None:
        work = partial(list_lines, config=config.lines)
        reports = run_parts("lines", files, work, directory, board, "part", "lines")
        names = tuple(report["name"] for report in reports)
        ranges = cut_keys(sum(report["lines"] for report in reports))
        find = partial(find_line_cuts, names=names, least=config.lines.documents)
        found += _load(
            directory, run_parts("repeated", ranges, find, directory, board, "range", stream=False)
        )
    if config.substring is not None:
        found += _find_passages(files, config.substring.words, directory, board)
    return merge_spans(np.concatenate(found))


def merge_spans(spans: np.ndarray) -> np.ndarray:
    """Ascending and disjoint; int64 [C, 3] of document, start and end."""
    spans = np.unique(spans.reshape(-1, 3), axis=0)
    merged: list[list[int]] = []
    for document, start, end in spans.tolist():
        if merged and merged[-1][0] == document and start <= merged[-1][2]:
            merged[-1][2] = max(merged[-1][2], end)
        else:
            merged.append([document, start, end])
    return np.array(merged, np.int64).reshape(-1, 3)


def list_lines(row: Row, directory: Path, config: LinesConfig) -> dict[str, Any]:
    """Write hash (sorted), document and span of every line of the row's kept documents."""
    hashes, places = [np.empty(0, np.uint64)], [np.empty((0, 3), np.int64)]
    for start, table in _read(row, directory):
        lines = split_lines(table["text"], config)
        hashes.append(lines.hashes)
        documents = (lines.documents + start)[:, None]
        places.append(np.concatenate([documents, lines.spans], axis=1))
    return _save_sorted(directory, f"lines-{row['number']:06d}", hashes, places, "lines")


def find_line_cuts(row: Row, directory: Path, names: Sequence[str], least: int) -> dict[str, Any]:
    """Write the spans of repeated lines with hashes in the row's range."""
    hashes, places = _read_range(row, directory, names)
    priority = np.load(directory / "priority.npy", mmap_mode="r")[places[:, 0]]
    cut = find_repeated(hashes, places[:, 0], priority, least)
    return _save(directory, f"repeated-{row['number']:06d}.npy", places[cut])


def _find_passages(
    files: Files, length: int, directory: Path, board: ProgressBoard
) -> list[np.ndarray]:
    work = partial(list_anchors, length=length)
    reports = run_parts("anchors", files, work, directory, board, "part", "anchors")
    names = tuple(report["name"] for report in reports)
    ranges = cut_keys(sum(report["anchors"] for report in reports))
    find = partial(pair_anchors, names=names)
    pairs = tuple(
        r["name"] for r in run_parts("pairs", ranges, find, directory, board, "range", stream=False)
    )
    starts = tuple((row["start"], row["used"], row["number"]) for row in files)
    cut = partial(find_passages, names=pairs, parts=starts, length=length)
    return _load(directory, run_parts("passages", files, cut, directory, board))


def list_anchors(row: Row, directory: Path, length: int) -> dict[str, Any]:
    """Write the words of the row's kept documents, and their anchors sorted by hash."""
    hashes, places = [np.empty(0, np.uint64)], [np.empty((0, 3), np.int64)]
    folded, sizes = [np.empty(0, np.uint32)], [np.empty(0, np.int64)]
    for start, table in _read(row, directory):
        words = split_words(table["text"])
        found, at = find_anchors(words, length)
        documents = np.searchsorted(words.offsets, at, side="right") - 1
        hashes.append(found)
        columns = [documents + start, at - words.offsets[documents], np.zeros(len(at), np.int64)]
        places.append(np.stack(columns, axis=1))
        folded.append(words.hashes.astype(np.uint32))
        sizes.append(np.diff(words.offsets))
    stem = f"words-{row['number']:06d}"
    _save(directory, f"{stem}.npy", np.concatenate(folded))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
    _save(directory, f"{stem}.offsets.npy", offsets)
    report = _save_sorted(directory, f"anchors-{row['number']:06d}", hashes, places, "anchors")
    return report | {"files": [*report["files"], f"{stem}.npy", f"{stem}.offsets.npy"]}


def pair_anchors(row: Row, directory: Path, names: Sequence[str]) -> dict[str, Any]:
    """Write (document, word, preferred document, its word) of equal anchors in a range."""
    hashes, places = _read_range(row, directory, names)
    priority = np.load(directory / "priority.npy", mmap_mode="r")[places[:, 0]]
    members, bounds = group(hashes)
    chosen = np.repeat(choose(members, bounds, places[:, 0], priority), np.diff(bounds))
    pairs = np.concatenate([places[members][:, :2], places[chosen][:, :2]], axis=1)
    pairs = pairs[members != chosen]
    return _save(directory, f"pairs-{row['number']:06d}.anchors.npy", np.unique(pairs, axis=0))


def find_passages(
    row: Row,
    directory: Path,
    names: Sequence[str],
    parts: Sequence[tuple[int, int, int]],
    length: int,
) -> dict[str, Any]:
    """Write the byte spans of passages of the row's documents that stand in preferred ones."""
    first, stop = row["start"], row["start"] + row["used"]
    found = [np.empty((0, 4), np.int64)]
    for name in names:
        pairs = np.load(directory / name, mmap_mode="r")
        low, high = np.searchsorted(pairs[:, 0], [first, stop])
        found.append(pairs[low:high])
    library = _Library(directory, parts)
    spans: dict[int, list[tuple[int, int]]] = {}
    for document, at, other, at_other in np.concatenate(found).tolist():
        known = spans.setdefault(document, [])
        if any(start <= at < end for start, end in known):
            continue  # inside a passage that is cut already
        start, end = extend(
            library.words(other), library.words(document), at_other, at, other == document
        )
        if end - start >= length:
            known.append((start, end))
    cuts = _locate(row, directory, spans)
    return _save(directory, f"passages-{row['number']:06d}.npy", cuts)


class _Library:
    """Words of any document, by memory map."""

    def __init__(self, directory: Path, parts: Sequence[tuple[int, int, int]]) -> None:
        self._directory, self._parts = directory, parts
        self._starts = np.array([start for start, _, _ in parts])
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def words(self, document: int) -> np.ndarray:
        """uint32 [words]"""
        place = int(np.searchsorted(self._starts, document, side="right")) - 1
        if place not in self._open:
            stem = self._directory / f"words-{self._parts[place][2]:06d}"
            self._open[place] = (
                np.load(f"{stem}.npy", mmap_mode="r"),
                np.load(f"{stem}.offsets.npy"),
            )
        words, offsets = self._open[place]
        row = document - self._parts[place][0]
        return np.asarray(words[offsets[row] : offsets[row + 1]])


def _locate(
    row: Row, directory: Path, spans: Mapping[int, Sequence[tuple[int, int]]]
) -> np.ndarray:
    """Word spans as byte spans; int64 [C, 3]."""
    cuts: list[tuple[int, int, int]] = []
    for start, table in _read(row, directory):
        for document in range(start, start + len(table)):
            if not spans.get(document):
                continue
            words = split_words(table["text"].slice(document - start, 1))
            for begin, end in spans[document]:
                cuts.append((document, int(words.starts[begin]), int(words.ends[end - 1])))
    return np.array(cuts, np.int64).reshape(-1, 3)


def _read(row: Row, directory: Path) -> Iterator[tuple[int, pa.Table]]:
    """(number of the first document, texts) with the texts of what is not kept left empty."""
    kept = np.load(directory / "standing.npy", mmap_mode="r")
    start, stop = row["start"], row["start"] + row["used"]
    for table in read_batches(Path(row["file"]), ["text"]):
        texts = table["text"].combine_chunks().slice(0, stop - start)
        if not len(texts):
            return
        here = pa.array(np.asarray(kept[start : start + len(texts)]))
        yield start, pa.table({"text": pc.if_else(here, texts, "")})
        start += len(texts)


def _read_range(row: Row, directory: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Keys (uint64) in the row's range, and their places (int64 [K, 3])."""
    keys, places = [np.empty(0, np.uint64)], [np.empty((0, 3), np.int64)]
    for name in names:
        column = np.load(directory / f"{name}.keys.npy", mmap_mode="r")
        here = find_range(column, row["start"], row["stop"])
        keys.append(column[here])
        places.append(np.load(directory / f"{name}.places.npy", mmap_mode="r")[here])
    return np.concatenate(keys), np.concatenate(places)


def _save_sorted(
    directory: Path,
    name: str,
    keys: Sequence[np.ndarray],
    places: Sequence[np.ndarray],
    what: str,
) -> dict[str, Any]:
    column = np.concatenate(keys)
    order = np.argsort(column, kind="stable")
    _save(directory, f"{name}.keys.npy", column[order])
    _save(directory, f"{name}.places.npy", np.concatenate(places)[order])
    files = [f"{name}.keys.npy", f"{name}.places.npy"]
    return {"name": name, "files": files, what: len(column)}


def _save(directory: Path, name: str, array: np.ndarray) -> dict[str, Any]:
    return {"name": save(directory, name, array), "files": [name]}


def _load(directory: Path, reports: Sequence[Row]) -> list[np.ndarray]:
    return [np.load(directory / report["name"]) for report in reports]
