"""JSON lines and plain text, compressed or not."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import IO, Any, cast

import pyarrow as pa

from raylign.config import SourceConfig
from raylign.data.sources.columns import Columns, pick, require_columns
from raylign.data.sources.cuts import Slice
from raylign.data.sources.rows import Row, accept, describe, reject
from raylign.data.sources.storage import Stored, is_url, open_stored

COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
_CODECS = {".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, OSError, pa.ArrowException)

# A document of a text file ends with the first paragraph beyond the one, or before the other.
PASSAGE_BYTES = 2000
LONGEST_PASSAGE_BYTES = 8000
# So many lines tell which columns a file has.
PEEKED_LINES = 100


def read(part: Slice) -> Iterator[Row]:
    """Rows of a slice of kind `jsonl` or `text`."""
    whole = part.name.endswith(COMPRESSED)
    with open_plain(part.path) as stream:
        found = _read_lines(stream, part.start, None if whole else part.stop, part.max_record_bytes)
        if part.kind == "jsonl":
            yield from _read_json_lines(found, part.name, part.columns)
        else:
            yield from _read_passages(found, part.name)


def open_plain(path: str) -> IO[bytes]:
    """The bytes of a file, decompressed by its name's ending."""
    name = path.partition("?")[0] if is_url(path) else path
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(open_stored(path)))
    for ending, codec in _CODECS.items():
        if name.endswith(ending):
            packed = pa.PythonFile(open_stored(path), mode="r")
            return cast(IO[bytes], io.BufferedReader(pa.CompressedInputStream(packed, codec)))
    return open_stored(path)


def check_columns(source: SourceConfig, stored: Sequence[Stored], key: str) -> None:
    """Raises `UserError` when the first lines of the first file lack a column of the recipe."""
    names: dict[str, None] = {}
    file = next((file for file in stored if file.size), None)
    if file is None:
        return
    try:
        with open_plain(file.path) as stream:
            found = _read_lines(stream, 0, None, source.max_record_bytes)
            for _, line, reason in islice(found, PEEKED_LINES):
                value = None if reason else _parse(line)
                if isinstance(value, dict):
                    names.update(dict.fromkeys(value))
    except _DAMAGE:
        return  # reading will tell
    if names:
        require_columns(source, names, file.path, key)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _read_lines(
    stream: IO[bytes], start: int, stop: int | None, most: int
) -> Iterator[tuple[int, bytes, str | None]]:
    """(offset, line, None) of the lines that begin in [start, stop).

    A reason stands in place of None where a line has more than `most` bytes (then this is its
    beginning), and where a compressed stream breaks off.
    """
    offset = start
    if start:
        stream.seek(start - 1)
        offset = start - 1 + sum(map(len, _rest_of_line(stream)))
    while stop is None or offset < stop:
        try:
            line = stream.readline(most + 1)
            size = len(line)
            reason = None
            if size > most:
                reason = "too_large"
                if not line.endswith(b"\n"):
                    size += sum(map(len, _rest_of_line(stream)))
        except _DAMAGE:
            yield offset, b"", "damaged_compression"
            return
        if not line:
            return
        yield offset, line, reason
        offset += size


def _rest_of_line(stream: IO[bytes]) -> Iterator[bytes]:
    """Pieces up to and with the next line end."""
    while piece := stream.readline(1 << 20):
        yield piece
        if piece.endswith(b"\n"):
            return


def _read_json_lines(
    found: Iterator[tuple[int, bytes, str | None]], name: str, columns: Columns
) -> Iterator[Row]:
    rich = columns.names() != (columns.text,)
    for offset, line, reason in found:
        origin = f"{name}@{offset}"
        if reason is not None:
            yield reject(origin, offset, line, reason)
        elif not line.isspace():
            yield _read_json_line(line, origin, offset, columns, rich)


def _read_json_line(line: bytes, origin: str, offset: int, columns: Columns, rich: bool) -> Row:
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        return reject(origin, offset, line, "invalid_utf8")
    except (ValueError, RecursionError):
        return reject(origin, offset, line, "invalid_json")
    if not isinstance(value, dict):
        return reject(origin, offset, line, "not_an_object")
    if columns.text in value:
        row = accept(origin, offset, value[columns.text])
    else:
        text = pick(value, columns.text)
        if text is None:
            return reject(origin, offset, line, "no_column")
        row = accept(origin, offset, text)
    return describe(row, value, columns) if rich else row


def _read_passages(found: Iterator[tuple[int, bytes, str | None]], name: str) -> Iterator[Row]:
    """Plain text by groups of paragraphs."""
    held: list[bytes] = []
    first = size = 0
    for offset, line, reason in found:
        if reason is not None:
            yield from _join_passage(held, name, first)
            held, size = [], 0
            yield reject(f"{name}@{offset}", offset, line, reason)
            continue
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
