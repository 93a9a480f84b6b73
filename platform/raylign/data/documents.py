"""A document as it is stored, and reading documents back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from raylign.config import UserError

DOCUMENTS = pa.schema(
    [
        ("doc_id", pa.string()),
        ("source", pa.string()),
        ("domain", pa.string()),
        ("origin", pa.string()),
        ("url", pa.string()),
        ("date", pa.string()),
        ("meta", pa.string()),
        ("text", pa.large_string()),
    ]
)
"""`doc_id`: 32 hexadecimal digits that depend on the place alone; `source`: label of the source;
`domain`: what the mixture weighs (the source's label when it names none); `origin`: file and offset
in words; `url` and `date` (ISO 8601): null when unknown; `meta`: JSON object of further columns, or
null; `text`: clean and never null."""


def list_document_files(directory: Path, key: str) -> list[Path]:
    """Parquet files of a `corpus` stage, or of any directory of them, in order.

    Raises `UserError` naming `key` when there are none, or one has no `text` column.
    """
    inner = directory / "documents"
    files = sorted((inner if inner.is_dir() else directory).glob("*.parquet"))
    if not files:
        raise UserError(f"{key}={directory}: holds no Parquet files of documents; correct the path")
    for file in files:
        try:
            names = pq.read_schema(file).names
        except (pa.ArrowInvalid, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{key}: {file} is not a readable Parquet file ({reason})") from None
        if "text" not in names:
            raise UserError(f"{key}: {file} has no column 'text'; it has {', '.join(names)}")
    return files


def read_batches(file: Path, columns: list[str], rows: int = 8192) -> Iterator[pa.Table]:
    """Tables of at most `rows` rows, in order; memory does not grow with the file.

    A table ends with its row group, whose bytes the writer has bounded: of large documents `rows`
    would be too many.

    Of the columns only `text` must be there: documents without `doc_id` are known by file and row,
    those without `domain` belong to "documents", and everything else is null.
    """
    reader = pq.ParquetFile(file)
    present = [name for name in columns if name in reader.schema_arrow.names]
    start = 0
    groups = range(reader.num_row_groups)
    for batch in (b for g in groups for b in reader.iter_batches(rows, [g], columns=present)):
        table = pa.Table.from_batches([batch])
        for name in columns:
            if name in present:
                continue
            values: list[str | None] = [None] * len(batch)
            if name == "doc_id":
                values = [f"{file.name}#{row}" for row in range(start, start + len(batch))]
            elif name in ("domain", "source"):
                values = ["documents"] * len(batch)
            table = table.append_column(name, pa.array(values, pa.string()))
        start += len(batch)
        yield table.select(columns)


def read_table(file: Path, columns: tuple[str, ...] = ("doc_id", "text")) -> pa.Table:
    """`read_batches`, as one table."""
    tables = list(read_batches(file, list(columns)))
    if tables:
        return pa.concat_tables(tables)
    return pa.table({name: pa.array([], DOCUMENTS.field(name).type) for name in columns})


def shuffle_key(doc_id: str, seed: int) -> int:
    """64 bits; sorting documents by it shuffles them, the same way wherever it is computed."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{doc_id}".encode())
