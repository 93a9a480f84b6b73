"""The documents that a tokenizer learns from and is measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylign.data.documents import read_batches, shuffle_key

Place = tuple[int, str, int, int]
"""Shuffle key, document id, number of the file and row."""


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A document of the sample."""

    text: str
    domain: str
    language: str | None
    """As the corpus' column `language` has it, where there is one."""


Spread = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""Results of a picklable function for items, in their order: `map`, or Ray's workers."""


def draw_sample(
    files: Sequence[Path], count: int, seed: int, limit: int | None = None, spread: Spread = map
) -> list[Excerpt]:
    """At most `count` documents, chosen and ordered by `shuffle_key`.

    With a `limit`, those that together reach so many bytes of UTF-8, and the one that passes it.
    Every file is read by a call of its own, which `spread` may do elsewhere; only the chosen
    documents' texts are held.
    """
    ranked: list[Place] = []
    for found in spread(partial(rank_documents, count=count, seed=seed), list(enumerate(files))):
        ranked = sorted([*ranked, *found])[:count]
    wanted: dict[int, dict[int, int]] = {}
    for rank, (*_, number, row) in enumerate(ranked):
        wanted.setdefault(number, {})[row] = rank
    chosen: dict[int, Excerpt] = {}
    for excerpts in spread(read_excerpts, [(files[n], rows) for n, rows in wanted.items()]):
        chosen |= excerpts
    return _cut([chosen[rank] for rank in sorted(chosen)], limit)


def rank_documents(numbered: tuple[int, Path], count: int, seed: int) -> list[Place]:
    """The `count` documents of a file whose keys are lowest, with the file's number."""
    number, file = numbered
    ranked: list[Place] = []
    row = 0
    for table in read_batches(file, ["doc_id"] if _has_ids(file) else ["doc_id", "text"]):
        for doc_id in table["doc_id"].to_pylist():
            ranked.append((shuffle_key(doc_id, seed), doc_id, number, row))
            row += 1
        if len(ranked) > 4 * count:
            ranked = sorted(ranked)[:count]
    return sorted(ranked)[:count]


def _has_ids(file: Path) -> bool:
    return "doc_id" in pq.read_schema(file).names


def read_excerpts(asked: tuple[Path, dict[int, int]]) -> dict[int, Excerpt]:
    """Documents of a file, by the rank that is asked for each row."""
    file, wanted = asked
    labelled = "language" in pq.read_schema(file).names
    columns = ["domain", "text", *(["language"] if labelled else [])]
    found: dict[int, Excerpt] = {}
    start = 0
    for table in read_batches(file, columns):
        inside = [row for row in range(start, start + len(table)) if row in wanted]
        part = table.take(pa.array([row - start for row in inside], pa.int64())).to_pylist()
        for row, document in zip(inside, part, strict=True):
            language = document.get("language")
            found[wanted[row]] = Excerpt(
                text=document["text"] or "",
                domain=str(document["domain"] or "documents"),
                language=None if language is None else str(language),
            )
        start += len(table)
    return found


def _cut(excerpts: list[Excerpt], limit: int | None) -> list[Excerpt]:
    if limit is None:
        return excerpts
    held = 0
    for number, excerpt in enumerate(excerpts, 1):
        held += len(excerpt.text.encode())
        if held >= limit:
            return excerpts[:number]
    return excerpts
