"""Parquet, by whole Arrow batches: in the good case no value of it becomes a Python object."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raylign.config import SourceConfig, UserError
from raylign.data.sources.columns import Columns, choose_columns, require_columns
from raylign.data.sources.cuts import Slice
from raylign.data.sources.gathering import RAW
from raylign.data.sources.rows import REJECTED_CHARS, Row, accept, describe, reject
from raylign.data.sources.storage import Stored, open_arrow

READ_ROWS = 1000


def cut_row_groups(file: Stored, source: SourceConfig, key: str) -> list[tuple[int, int]]:
    """Runs of row groups of about `part_bytes`. Raises `UserError` for what is not Parquet, and for
    columns that are missing or hold no text."""
    try:
        with open_arrow(file.path) as stream:
            reader = pq.ParquetFile(stream)
            schema, metadata = reader.schema_arrow, reader.metadata
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{key}: {file.path} is not a readable Parquet file ({reason}); replace it"
        ) from None
    require_columns(source, schema.names, file.path, key)
    column = choose_columns(source).text
    kind = _type_of(schema, column)
    if kind is None or not _is_text(kind):
        raise UserError(
            f"{key}.text_column={column}: holds {kind} in {file.path}; name a text column"
        )
    bounds, start, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= source.part_bytes:
            bounds.append((start, group + 1))
            start, size = group + 1, 0
    if start < metadata.num_row_groups:
        bounds.append((start, metadata.num_row_groups))
    return bounds


def _type_of(schema: pa.Schema, column: str) -> pa.DataType | None:
    if column in schema.names:
        return schema.field(column).type
    first, *inner = column.split(".")
    kind: Any = schema.field(first).type if first in schema.names else None
    for name in inner:
        at = kind.get_field_index(name) if kind is not None and pa.types.is_struct(kind) else -1
        kind = kind.field(at).type if at >= 0 else None
    return kind


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def read(part: Slice) -> Iterator[Row | pa.Table]:
    """Tables of `RAW`; rows where a batch is not valid UTF-8, or a row group is damaged."""
    with open_arrow(part.path) as stream:
        reader = pq.ParquetFile(stream)
        metadata, present = reader.metadata, reader.schema_arrow.names
        columns = part.columns
        wanted = list(dict.fromkeys(_top(name, present) for name in columns.names()))
        wanted = [name for name in wanted if name in present]
        before = sum(metadata.row_group(g).num_rows for g in range(part.start))
        for group in range(part.start, part.stop):
            row, after = before, before + metadata.row_group(group).num_rows
            try:
                for batch in reader.iter_batches(READ_ROWS, row_groups=[group], columns=wanted):
                    yield from read_batch(batch, row, part, columns)
                    row += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                text = f"{after - row} rows: {error}".encode()
                for lost in range(row, after):  # each is a record that is missing
                    yield reject(f"{part.name}#{lost}", lost, text, "damaged_row_group")
            before = after


def _top(name: str, present: list[str]) -> str:
    return name if name in present else name.partition(".")[0]


def read_batch(
    batch: pa.RecordBatch, start: int, part: Slice, columns: Columns
) -> Iterator[Row | pa.Table]:
    """The same from one batch whose first row is number `start`."""
    text = _column(batch, columns.text)
    try:
        text = text.cast(pa.large_string())
        text.validate(full=True)
        yield _tabulate(batch, text, start, part, columns)
    except (pa.ArrowInvalid, UnicodeDecodeError):
        for row in range(batch.num_rows):
            yield _read_value(batch, text[row], row, start, part, columns)


def _tabulate(
    batch: pa.RecordBatch, text: pa.Array, start: int, part: Slice, columns: Columns
) -> pa.Table:
    rows = batch.num_rows
    reason = pc.if_else(pc.is_null(text), pa.scalar("not_text"), pa.scalar(None, pa.string()))
    large = pc.greater(pc.binary_length(text), part.max_record_bytes)
    if pc.any(large).as_py():
        reason = pc.if_else(large.fill_null(False), pa.scalar("too_large"), reason)
        text = pc.if_else(large, pc.utf8_slice_codeunits(text, 0, REJECTED_CHARS), text)
    found = {
        "origin": pa.array([f"{part.name}#{row}" for row in range(start, start + rows)]),
        "offset": pa.array(np.arange(start, start + rows)),
        "text": text.fill_null(""),
        "reason": reason,
        **_describe(batch, columns),
    }
    nulls = {f.name: pa.nulls(rows, f.type) for f in RAW if f.name not in found}
    return pa.table(found | nulls, schema=RAW)


def _describe(batch: pa.RecordBatch, columns: Columns) -> dict[str, pa.Array]:
    """Further columns; those that need Python only when they are asked for."""
    kept = columns.names()[1:]
    if not kept:
        return {}
    records = batch.select([n for n in batch.schema.names if n != columns.text]).to_pylist()
    rows = [describe(Row("", 0, ""), record, columns) for record in records]
    return {
        name: pa.array([getattr(row, name) for row in rows], pa.string())
        for name in ("domain", "url", "date", "meta")
    }


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    if name in batch.schema.names:
        return batch.column(name)
    first, *inner = name.split(".")
    values = batch.column(first)
    for part in inner:
        values = pc.struct_field(values, part)
    return values


def _read_value(
    batch: pa.RecordBatch, value: pa.Scalar, row: int, start: int, part: Slice, columns: Columns
) -> Row:
    origin, offset = f"{part.name}#{start + row}", start + row
    try:
        found = accept(origin, offset, value.as_py())
    except UnicodeDecodeError:
        return reject(origin, offset, bytes(value.as_buffer()), "invalid_utf8")
    if len(columns.names()) == 1:
        return found
    try:
        others: dict[str, Any] = {
            name: batch.column(name)[row].as_py()
            for name in batch.schema.names
            if name != columns.text
        }
    except UnicodeDecodeError:
        return reject(origin, offset, found.text.encode(), "invalid_utf8")
    return describe(found, others, columns)
