"""Rows of JSON lines, a JSON array or Parquet, each with its number in the file."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylign.config import UserError
from raylign.data.sources.lines import open_plain

Row = dict[str, Any]

_BATCH = 512
_HEAD_BYTES = 4096
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, OSError, pa.ArrowException)


def read_rows(file: Path, what: str) -> Iterator[tuple[int, Row | str]]:
    """(number, row), or (number, why it is none), of a file that may be compressed.

    Numbers count from 1: lines of JSON lines (blank ones are skipped), elements of a JSON array,
    rows of Parquet. Raises `UserError`, which calls the file `what`, when it cannot be read.
    """
    if not file.is_file():
        raise UserError(f"{what} {file} do not exist; give JSON lines, a JSON array or Parquet")
    try:
        with open_plain(str(file)) as stream:
            head = stream.read(_HEAD_BYTES)
        if head.startswith(b"PAR1"):
            yield from _read_parquet(file)
        elif head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from _read_array(file, what)
        else:
            yield from _read_lines(file)
    except _DAMAGE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what} {file} cannot be read: {reason}") from None


def _read_lines(file: Path) -> Iterator[tuple[int, Row | str]]:
    with open_plain(str(file)) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    yield number, "not valid JSON"
                else:
                    yield number, _require_object(value)


def _read_array(file: Path, what: str) -> Iterator[tuple[int, Row | str]]:
    with open_plain(str(file)) as stream:
        text = stream.read()
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {file} are not a valid JSON array: {error}") from None
    for number, value in enumerate(values, 1):
        yield number, _require_object(value)


def _read_parquet(file: Path) -> Iterator[tuple[int, Row | str]]:
    number = 0
    with pq.ParquetFile(file) as stored:
        for batch in stored.iter_batches(batch_size=_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield number, _drop_nulls(row)


def _require_object(value: Any) -> Row | str:
    return value if isinstance(value, dict) else "not a JSON object"


def _drop_nulls(value: Any) -> Any:
    """Without the fields that a struct of Parquet has only because another row has them."""
    if isinstance(value, dict):
        return {name: _drop_nulls(item) for name, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value
