"""ARC, what archives were before WARC: a line of five words, then so many bytes.

After "ARC File Format, version 1.0" of the Internet Archive (1996).
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import IO, cast

from raylign.data.sources.cuts import Slice
from raylign.data.sources.pages import check_address, parse_response, read_page
from raylign.data.sources.rows import Row, reject

_FIRST = b"filedesc://"
_DAMAGE = (EOFError, OSError, zlib.error)
_LONGEST_HEADER = 16 << 10
# An address may hold spaces, so the words are counted from the end of the line.
_HEADER = re.compile(rb"(\S.*) (\S+) (\d{14}) (\S+) (?:.* )?(\d+)\s*\n")


def is_arc(stream: IO[bytes], codec: str) -> bool:
    """Whether the file begins as ARC files do; leaves the stream at its beginning."""
    stream.seek(0)
    head = stream.read(4096)
    stream.seek(0)
    if codec == "gzip":
        try:
            head = zlib.decompressobj(31).decompress(head, 64)
        except zlib.error:
            return False
    return head.startswith(_FIRST)


def read(stream: IO[bytes], codec: str, part: Slice) -> Iterator[Row]:
    """One row for every record; places count bytes of the unpacked file."""
    plain = cast(IO[bytes], gzip.GzipFile(fileobj=stream)) if codec == "gzip" else stream
    place = 0
    while True:
        row: Row | None
        try:
            line = plain.readline(_LONGEST_HEADER)
            if not line:
                return
            if not line.strip():
                place += len(line)
                continue
            row, size = _read_record(plain, line, place, part)
        except _DAMAGE:
            yield reject(f"{part.name}@{place}", place, b"", "damaged_compression")
            return
        yield row
        place += len(line) + size


def _read_record(stream: IO[bytes], line: bytes, place: int, part: Slice) -> tuple[Row, int]:
    """(row, bytes after the line that were read)."""
    origin = f"{part.name}@{place}"
    match = _HEADER.fullmatch(line)
    if match is None:
        return reject(origin, place, line, "damaged_header"), 0
    address, _, date, _, length = (word.decode("utf-8", "replace") for word in match.groups())
    if int(length) > part.max_record_bytes:
        _skip(stream, int(length))
        return reject(origin, place, line, "too_large"), int(length)
    body = stream.read(int(length))
    if len(body) < int(length):
        return reject(origin, place, line, "truncated_record"), len(body)
    if line.startswith((_FIRST, b"dns:")) or part.kind == "wet":
        kind = "not_a_conversion" if part.kind == "wet" else "not_a_response"
        return Row(origin, place, address, kind), len(body)
    url = check_address(address)
    if url is None:
        return reject(origin, place, line, "bad_target_uri"), len(body)
    row = Row(origin, place, "", None, None, url, _date(date))
    page = parse_response(body)
    return read_page(page, row, part.extractor, part.max_record_bytes), len(body)


def _skip(stream: IO[bytes], size: int) -> None:
    while size > 0 and (piece := stream.read(min(size, 1 << 20))):
        size -= len(piece)


def _date(digits: str) -> str | None:
    try:
        return datetime.strptime(digits, "%Y%m%d%H%M%S").replace(tzinfo=UTC).isoformat()
    except ValueError:
        return None
