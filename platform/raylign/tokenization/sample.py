"""The documents that a tokenizer learns from and is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from raylign.data.documents import read_batches, shuffle_key


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A document of the sample."""

    text: str
    domain: str
    language: str | None
    """As the corpus' column `language` has it, where there is one."""


def draw_sample(
    files: list[Path], count: int, seed: int, limit: int | None = None
) -> list[Excerpt]:
    """At most `count` documents, chosen and ordered by `shuffle_key`.

    With a `limit`, those that together reach so many bytes of UTF-8, and the one that passes it.
    Only the chosen documents' texts are held.
    """
    ranked: list[tuple[int, str, int, int]] = []
    for number, file in enumerate(files):
        row = 0
        for table in read_batches(file, ["doc_id", "text"] if not _has_ids(file) else ["doc_id"]):
            for doc_id in table["doc_id"].to_pylist():
                ranked.append((shuffle_key(doc_id, seed), doc_id, number, row))
                row += 1
            if len(ranked) > 4 * count:
                ranked = sorted(ranked)[:count]
    places = {(number, row): rank for rank, (*_, number, row) in enumerate(sorted(ranked)[:count])}
    chosen: dict[int, Excerpt] = {}
    for number, file in enumerate(files):
        wanted = {row: rank for (n, row), rank in places.items() if n == number}
        if wanted:
            chosen |= _read(file, wanted)
    return _cut([chosen[rank] for rank in sorted(chosen)], limit)


def _has_ids(file: Path) -> bool:
    return "doc_id" in pq.read_schema(file).names


def _read(file: Path, wanted: dict[int, int]) -> dict[int, Excerpt]:
    """Documents of the wanted rows, by the rank that `wanted` gives each."""
    labelled = "language" in pq.read_schema(file).names
    columns = ["domain", "text", *(["language"] if labelled else [])]
    found: dict[int, Excerpt] = {}
    start = 0
    for table in read_batches(file, columns):
        inside = [row for row in range(start, start + len(table)) if row in wanted]
        part = table.take([row - start for row in inside]).to_pylist()
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
