"""Where documents come from: sources are cut into slices, and every slice is read on its own.

A slice is a plain row of numbers and strings, decided by the recipe and the data alone. So any
worker can read any slice, the same slices come out on one core and on a thousand, and a document's
identity (hash of source, path and offset) never depends on who read it or when.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import xxhash

from raylign.config import SourceConfig, TextbookConfig, UserError
from raylign.data.sources import files as source_files
from raylign.data.sources import python as source_python
from raylign.data.sources.rows import Row
from raylign.data.textbook.arithmetic import write_page

TEXTBOOK = "textbook"
PAGES_A_SLICE = 1000
MODULES_A_SLICE = 48
BATCH_DOCUMENTS = 1000
BATCH_CHARS = 8 << 20

SCHEMA = pa.schema(
    [
        ("doc_id", pa.string()),
        ("source", pa.string()),
        ("origin", pa.string()),
        ("text", pa.large_string()),
        ("reasons", pa.list_(pa.string())),
        ("slice", pa.int32()),
        ("position", pa.int64()),
        ("batch", pa.int64()),
    ]
)
"""A document on its way: `origin` says in words where it stood, `reasons` why it is rejected (empty
while it is not), `slice` and `position` give its place in the order of the corpus, and `batch` is
the position of the first document of its table."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of one source; rows of this are what Ray Data distributes."""

    index: int
    """Place among all slices."""
    kind: str
    source: str
    """Label of the source in every table and report."""
    path: str
    """File (absolute), or "" for what is built in."""
    name: str
    """The file's path below its source, or ""."""
    start: int
    """First byte, row group, page or module."""
    stop: int
    """Where the next slice begins."""
    text_column: str
    limit: int
    """Documents after which the slice may stop; 0 for none."""


def plan_slices(sources: Sequence[SourceConfig], textbook: TextbookConfig) -> list[Slice]:
    """Cut all sources. Raises `UserError` for a path that is missing or cannot be used."""
    labels = _label(sources)
    slices: list[Slice] = []
    for number, (source, label) in enumerate(zip(sources, labels, strict=True)):
        for cut in _cut(source, textbook, f"prepare.sources.{number}"):
            slices.append(
                Slice(
                    index=len(slices),
                    kind=source.kind,
                    source=label,
                    path=cut.path,
                    name=cut.name,
                    start=cut.start,
                    stop=cut.stop,
                    text_column=source.text_column,
                    limit=source.limit or 0,
                )
            )
    return slices


def _label(sources: Sequence[SourceConfig]) -> list[str]:
    """A name for each source: its kind when built in, else its file's or directory's name."""
    for number, source in enumerate(sources):
        key = f"prepare.sources.{number}"
        if (source.kind in source_files.KINDS) != (source.path is not None):
            verb = "needs a path" if source.path is None else "takes no path"
            raise UserError(f"{key}: kind={source.kind} {verb}; give `kind` and `path` that agree")
        if source in sources[:number] or any(
            s.kind == source.kind and s.path == source.path for s in sources[:number]
        ):
            raise UserError(f"{key}: {source.path or source.kind} is listed twice; remove one")
    names = [s.path.resolve().name.split(".")[0] if s.path else s.kind for s in sources]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    return [
        str(s.path) if s.path and (name in repeated or not name) else name
        for s, name in zip(sources, names, strict=True)
    ]


def _cut(source: SourceConfig, textbook: TextbookConfig, key: str) -> Iterator[source_files.Cut]:
    if source.kind == TEXTBOOK:
        yield from _ranges(min(textbook.pages, source.limit or textbook.pages), PAGES_A_SLICE)
    elif source.kind == "docstrings":
        yield from _ranges(len(source_python.list_modules()), MODULES_A_SLICE)
    elif source.kind == "pydoc":
        yield from _ranges(1, 1)
    else:
        yield from source_files.cut(source, key)


def _ranges(total: int, size: int) -> Iterator[source_files.Cut]:
    for start in range(0, total, size):
        yield source_files.Cut("", "", start, min(start + size, total))


def read_slice(part: Slice, textbook: TextbookConfig, seed: int) -> Iterator[pa.Table]:
    """The slice's documents as tables of `SCHEMA`, rejected rows included.

    Tables hold at most `BATCH_DOCUMENTS` rows and, but for one larger document, `BATCH_CHARS`
    characters: memory does not grow with the slice.
    """
    batch: list[Row] = []
    chars = position = taken = 0
    for row in _read_rows(part, textbook, seed):
        if batch and (len(batch) == BATCH_DOCUMENTS or chars + len(row.text) > BATCH_CHARS):
            yield _table(batch, part, position)
            position += len(batch)
            batch, chars = [], 0
        batch.append(row)
        chars += len(row.text)
        taken += row.reason is None
        if taken == part.limit and part.limit:
            break
    if batch:
        yield _table(batch, part, position)


def _read_rows(part: Slice, textbook: TextbookConfig, seed: int) -> Iterator[Row]:
    if part.kind == TEXTBOOK:
        for number in range(part.start, part.stop):
            rng = random.Random(f"textbook/{seed}/{number}")  # as in `write_textbook`
            page = write_page(rng, textbook.max_digits, textbook.worked_share)
            yield Row(f"page {number}", number, page)
    elif part.kind == "docstrings":
        yield from source_python.read_docstrings(part.start, part.stop)
    elif part.kind == "pydoc":
        yield from source_python.read_topics()
    else:
        yield from source_files.read(
            part.kind, Path(part.path), part.name, part.start, part.stop, part.text_column
        )


def _table(rows: Sequence[Row], part: Slice, position: int) -> pa.Table:
    columns: dict[str, Sequence[object]] = {
        "doc_id": [identify(part.source, part.name, row) for row in rows],
        "source": [part.source] * len(rows),
        "origin": [f"{part.source}:{row.origin}" for row in rows],
        "text": [row.text for row in rows],
        "reasons": [[] if row.reason is None else [row.reason] for row in rows],
        "slice": [part.index] * len(rows),
        "position": range(position, position + len(rows)),
        "batch": [position] * len(rows),
    }
    return pa.table(
        {name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}
    )


def identify(source: str, name: str, row: Row) -> str:
    """A document's id: 32 hexadecimal digits of xxh3-128 over its source, file and place."""
    place = name or row.origin
    return xxhash.xxh3_128_hexdigest(f"{source}\0{place}\0{row.offset}".encode())
