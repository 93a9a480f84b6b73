"""Records of a reader gathered into tables of documents: extracted, repaired, cleaned, identified.

Readers yield rows, or whole tables of `RAW` columns where a format is columnar. What Python need
not touch stays in Arrow: of clean texts, no string is ever made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from raylign.data.documents import DOCUMENTS
from raylign.data.extraction.main_text import extract
from raylign.data.extraction.polishing import polish
from raylign.data.sources.cuts import Slice
from raylign.data.sources.rows import Row

BATCH_DOCUMENTS = 1000
BATCH_CHARS = 8 << 20

FOUND = pa.schema([*DOCUMENTS, ("offset", pa.int64()), ("reason", pa.string())])
"""A record that was found: the columns of a document, its `offset` in its file, and why it is not
used (null when it is; otherwise `text` is the beginning of what was found)."""

RAW = pa.schema(
    [
        ("origin", pa.string()),
        ("offset", pa.int64()),
        ("text", pa.large_string()),
        ("reason", pa.string()),
        ("domain", pa.string()),
        ("url", pa.string()),
        ("date", pa.string()),
        ("meta", pa.string()),
    ]
)
"""`Row` as a table."""


def gather(found: Iterable[Row | pa.Table], part: Slice) -> Iterator[pa.Table]:
    """Tables of `FOUND`, in order, until the slice's limit of usable documents is reached."""
    left = part.limit or None
    for table in _batch(found):
        for piece in _split(_finish(table, part)):
            if left is None:
                yield piece
                continue
            piece = _take(piece, left)
            yield piece
            left -= piece["reason"].null_count
            if not left:
                return


def _batch(found: Iterable[Row | pa.Table]) -> Iterator[pa.Table]:
    """Tables of `RAW`, bounded."""
    batch: list[Row] = []
    chars = 0
    for item in found:
        if not isinstance(item, Row):
            if batch:
                yield tabulate(batch)
                batch, chars = [], 0
            yield item
            continue
        if batch and (len(batch) == BATCH_DOCUMENTS or chars + len(item.text) > BATCH_CHARS):
            yield tabulate(batch)
            batch, chars = [], 0
        batch.append(item)
        chars += len(item.text)
    if batch:
        yield tabulate(batch)


def tabulate(rows: Sequence[Row]) -> pa.Table:
    """Rows as a table of `RAW`."""
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in RAW]
    return pa.Table.from_arrays(columns, schema=RAW)


def _split(table: pa.Table) -> Iterator[pa.Table]:
    """The same rows, in tables of the promised size."""
    if table.num_rows <= BATCH_DOCUMENTS and table["text"].nbytes <= BATCH_CHARS:
        yield table
        return
    sizes = pc.binary_length(table["text"]).to_pylist()
    start = held = 0
    for row, size in enumerate(sizes):
        if row > start and (held + size > BATCH_CHARS or row - start == BATCH_DOCUMENTS):
            yield table.slice(start, row - start)
            start, held = row, 0
        held += size
    yield table.slice(start)


def _take(table: pa.Table, count: int) -> pa.Table:
    """The rows up to the `count`-th usable one."""
    if table["reason"].null_count <= count:
        return table
    usable = [row for row, good in enumerate(pc.is_null(table["reason"]).to_pylist()) if good]
    return table.slice(0, usable[count - 1] + 1)


def _finish(table: pa.Table, part: Slice) -> pa.Table:
    """`RAW` to `FOUND`."""
    texts, reasons = table["text"].combine_chunks(), table["reason"].combine_chunks()
    if part.html and part.kind not in ("warc", "wet"):
        texts, reasons = _extract(texts, reasons, part.extractor)
    texts = polish(texts, pc.is_null(reasons))
    bare = pc.and_(pc.is_null(reasons), pc.equal(pc.binary_length(texts), 0))
    reasons = pc.if_else(bare, pa.scalar("empty"), reasons)
    rows = table.num_rows
    places, offsets = table["origin"].to_pylist(), table["offset"].to_pylist()
    ids = [
        identify(part.source, part.name or place, offset)
        for place, offset in zip(places, offsets, strict=True)
    ]
    columns = {
        "doc_id": pa.array(ids, pa.string()),
        "source": pa.repeat(pa.scalar(part.source), rows),
        "domain": pc.fill_null(table["domain"], part.domain),
        "origin": pa.array([f"{part.source}:{place}" for place in places], pa.string()),
        "url": table["url"],
        "date": table["date"],
        "meta": table["meta"],
        "text": texts,
        "offset": table["offset"],
        "reason": reasons,
    }
    return pa.table(columns, schema=FOUND)


def _extract(texts: pa.Array, reasons: pa.Array, extractor: str) -> tuple[pa.Array, pa.Array]:
    """Main texts of cells that hold HTML."""
    found, why = texts.to_pylist(), reasons.to_pylist()
    for row, reason in enumerate(why):
        if reason is None:
            found[row] = extract(found[row], None, extractor)
            if not found[row]:
                why[row] = "no_main_text"
    return pa.array(found, pa.large_string()), pa.array(why, pa.string())


def identify(source: str, place: str, offset: int) -> str:
    """A document's id: 32 hexadecimal digits of xxh3-128 over its source, file and place."""
    return xxhash.xxh3_128_hexdigest(f"{source}\0{place}\0{offset}".encode())
