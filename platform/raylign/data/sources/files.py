"""Documents in files: JSON lines, Parquet and plain text, cut where reading may begin.

Files of lines are cut at fixed byte positions; a cut owns the lines that *begin* inside it. Parquet
is cut at row groups. A gzip file cannot be entered in the middle and stays whole.
"""

from __future__ import annotations

import difflib
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from raylign.config import SourceConfig, UserError
from raylign.data.sources.rows import Row, accept, reject

KINDS = {
    "jsonl": (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz"),
    "parquet": (".parquet",),
    "text": (".txt", ".text", ".md", ".txt.gz"),
}
"""Kind to the file names that are read from a directory; a file given by name may be called
anything."""

CUT_BYTES = 32 << 20
READ_ROWS = 1000
# A document of a text file ends with the first paragraph beyond the one, or before the other.
PASSAGE_BYTES = 2000
LONGEST_PASSAGE_BYTES = 8000


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of a file: bytes, or row groups, `start`..`stop`."""

    path: str
    name: str
    start: int
    stop: int


def cut(source: SourceConfig, key: str) -> Iterator[Cut]:
    """All parts of a file source. Raises `UserError` for what cannot be read."""
    assert source.path is not None
    if not source.path.exists():
        raise UserError(f"{key}.path={source.path}: no such file or directory; correct the path")
    root = source.path.resolve()
    names = [""] if root.is_file() else _list_files(root, KINDS[source.kind])
    if not names:
        wanted = " or ".join(KINDS[source.kind])
        raise UserError(f"{key}.path={source.path}: holds no {wanted} file; correct path or kind")
    for name in names:
        file = root / name if name else root
        label = name or root.name
        if source.kind == "parquet":
            bounds = _cut_row_groups(file, source.text_column, key)
        else:
            bounds = _cut_bytes(file, key)
        for start, stop in bounds:
            yield Cut(str(file), label, start, stop)


def _list_files(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    found = (f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file())
    return sorted(name for name in found if name.endswith(suffixes))


def _cut_bytes(file: Path, key: str) -> list[tuple[int, int]]:
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be read ({error.strerror}); correct it") from None
    if file.suffix == ".gz":
        return [(0, size)]
    return [(start, min(start + CUT_BYTES, size)) for start in range(0, size, CUT_BYTES)]


def _cut_row_groups(file: Path, column: str, key: str) -> list[tuple[int, int]]:
    try:
        reader = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{key}: {file} is not a readable Parquet file ({reason}); replace it"
        ) from None
    schema = reader.schema_arrow
    if column not in schema.names:
        close = difflib.get_close_matches(column, schema.names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(schema.names)}"
        raise UserError(f"{key}.text_column={column}: {file} has no such column; {hint}")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{key}.text_column={column}: holds {kind} in {file}; name a text column")
    bounds, start, size = [], 0, 0
    for group in range(reader.metadata.num_row_groups):
        size += reader.metadata.row_group(group).total_byte_size
        if size >= CUT_BYTES:
            bounds.append((start, group + 1))
            start, size = group + 1, 0
    if start < reader.metadata.num_row_groups:
        bounds.append((start, reader.metadata.num_row_groups))
    return bounds


def read(kind: str, path: Path, name: str, start: int, stop: int, column: str) -> Iterator[Row]:
    """Rows of one cut; what cannot be read is a rejected row, never lost."""
    if kind == "parquet":
        yield from _read_parquet(path, name, start, stop, column)
        return
    with _open(path) as stream:
        lines = _read_lines(stream, start, None if path.suffix == ".gz" else stop)
        if kind == "jsonl":
            yield from _read_json_lines(lines, name, column)
        else:
            yield from _read_passages(lines, name)


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _read_lines(
    stream: IO[bytes], start: int, stop: int | None
) -> Iterator[tuple[int, bytes | str]]:
    """(offset, line) of the lines that begin in [start, stop).

    Where a compressed stream breaks off, a reason (`str`) stands for the line.
    """
    offset = start
    if start:
        stream.seek(start - 1)
        offset = start - 1 + len(stream.readline())
    while stop is None or offset < stop:
        try:
            line = stream.readline()
        except (EOFError, gzip.BadGzipFile, zlib.error):
            yield offset, "damaged_gzip"
            return
        if not line:
            return
        yield offset, line
        offset += len(line)


def _read_json_lines(
    lines: Iterator[tuple[int, bytes | str]], name: str, column: str
) -> Iterator[Row]:
    for offset, line in lines:
        if isinstance(line, str):
            yield reject(f"{name}@{offset}", offset, b"", line)
        elif line.strip():
            yield _read_json_line(line, name, offset, column)


def _read_json_line(line: bytes, name: str, offset: int, column: str) -> Row:
    origin = f"{name}@{offset}"
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        return reject(origin, offset, line, "invalid_utf8")
    except (ValueError, RecursionError):
        return reject(origin, offset, line, "invalid_json")
    if not isinstance(value, dict):
        return reject(origin, offset, line, "not_an_object")
    if column not in value:
        return reject(origin, offset, line, f"no_column_{column}")
    return accept(origin, offset, value[column])


def _read_passages(lines: Iterator[tuple[int, bytes | str]], name: str) -> Iterator[Row]:
    """Plain text by groups of paragraphs."""
    held: list[bytes] = []
    first = size = 0
    for offset, line in lines:
        if isinstance(line, str):
            yield from _join_passage(held, name, first)
            yield reject(f"{name}@{offset}", offset, b"", line)
            return
        ended = size >= PASSAGE_BYTES and not held[-1].strip() and bool(line.strip())
        if held and (ended or size + len(line) > LONGEST_PASSAGE_BYTES):
            yield from _join_passage(held, name, first)
            held, size = [], 0
        if not held:
            first = offset
        held.append(line)
        size += len(line)
    yield from _join_passage(held, name, first)


def _join_passage(held: list[bytes], name: str, first: int) -> Iterator[Row]:
    raw = b"".join(held)
    if not raw.strip():
        return
    origin = f"{name}@{first}"
    try:
        yield Row(origin, first, raw.decode())
    except UnicodeDecodeError:
        yield reject(origin, first, raw, "invalid_utf8")


def _read_parquet(path: Path, name: str, start: int, stop: int, column: str) -> Iterator[Row]:
    reader = pq.ParquetFile(path)
    for group in range(start, stop):
        before = sum(reader.metadata.row_group(g).num_rows for g in range(group))
        row = before
        try:
            for batch in reader.iter_batches(READ_ROWS, row_groups=[group], columns=[column]):
                for value in batch.column(0):
                    yield _accept_value(f"{name}#{row}", row, value)
                    row += 1
        except (pa.ArrowException, OSError) as error:
            lost = before + reader.metadata.row_group(group).num_rows - row
            text = f"{lost} rows: {error}"
            yield reject(f"{name}#{row}", row, text.encode(), "damaged_row_group")


def _accept_value(origin: str, row: int, value: pa.Scalar) -> Row:
    try:
        return accept(origin, row, value.as_py())
    except UnicodeDecodeError:
        return reject(origin, row, bytes(value.as_buffer()), "invalid_utf8")
