"""Web archives: WARC with HTTP responses, and WET, whose records are text already.

In the good case fastwarc (J. Bevendorff, M. Potthast, B. Stein, 2021) does the work. Where it
stops, at a damaged member or a length that is not true, the file is searched for the next record,
and reading goes on there: what is lost is one record, and it is reported with its place.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from typing import IO, Any

from raylign.data.sources import arc
from raylign.data.sources.cuts import Slice
from raylign.data.sources.pages import Page, check_address, read_page, split_type
from raylign.data.sources.rows import Row, accept, date_text, reject
from raylign.data.sources.storage import open_stored

_RESPONSE, _RESOURCE, _CONVERSION = 4, 8, 128
_NAMES = {
    2: "warcinfo",
    4: "response",
    8: "resource",
    16: "request",
    32: "metadata",
    64: "revisit",
    128: "conversion",
    256: "continuation",
}
_GZIP = b"\x1f\x8b\x08"
_MAGIC = {_GZIP: "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
_RECORD = re.compile(rb"WARC/\d\.\d\r?\n")
_LENGTH = re.compile(rb"\nContent-Length:\s*(\d+)\s*\r?\n", re.IGNORECASE)
_WINDOW = 1 << 20
_HEAD_BYTES = 64 << 10


class _Broken(Exception):
    """A record that was found to be damaged while it was read."""


def read(part: Slice) -> Iterator[Row]:
    """Rows of a slice of kind `warc` or `wet`: one for every record, documents or not."""
    with open_stored(part.path) as stream:
        head = stream.read(16)
        codec = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "plain")
        if arc.is_arc(stream, codec):
            yield from arc.read(stream, codec, part)
        elif head:
            yield from _read_records(stream, codec, part)


def _read_records(stream: IO[bytes], codec: str, part: Slice) -> Iterator[Row]:
    position: int | None = 0
    while position is not None:
        last, held, reason = position, None, ""
        try:
            for place, record in _iterate(stream, codec, position):
                if held is not None:
                    yield held
                last, held = place, None
                held = _read_record(record, place, part)
            if held is not None:
                yield held
            yield from _check_end(stream, codec, part, last)
            return
        except _Broken as broken:
            reason = str(broken)
        except OSError as error:
            reason = "damaged_compression" if "ompress" in str(error) else "damaged_record"
        position = yield from _recover(stream, codec, part, last, held, reason)


def _recover(
    stream: IO[bytes], codec: str, part: Slice, last: int, held: Row | None, reason: str
) -> Any:
    """Report the damage after or in the record at `last`, and return where reading goes on."""
    framed, end = check_frame(stream, codec, last, part.max_record_bytes)
    if held is None or not framed:
        position = find_record(stream, codec, last + 1)
        if reason in ("wrong_content_length", "damaged_header") and position is None:
            reason = "truncated_record"
        elif held is not None and held.reason is None:
            reason = "wrong_content_length"
        if held is None or held.reason is None:
            held = _damaged(stream, part, last, reason)
        yield held
        return position
    yield held
    position = find_record(stream, codec, end)
    if position == end:  # it begins like a record, and is none
        position = find_record(stream, codec, end + 1)
    yield _damaged(stream, part, end, reason)
    return position


def _check_end(stream: IO[bytes], codec: str, part: Slice, last: int) -> Iterator[Row]:
    """What fastwarc passes over: a last member that breaks off before its record has begun."""
    if codec == "gzip":
        framed, end = check_frame(stream, codec, last, part.max_record_bytes)
        stream.seek(end)
        if framed and stream.read(1):
            yield _damaged(stream, part, end, "truncated_record")


def _damaged(stream: IO[bytes], part: Slice, place: int, reason: str) -> Row:
    stream.seek(place)
    return reject(f"{part.name}@{place}", place, stream.read(200), reason)


class _From:
    """A stream that begins at a place of another."""

    def __init__(self, stream: IO[bytes], start: int) -> None:
        stream.seek(start)
        self._stream, self._at = stream, 0

    def read(self, size: int = -1) -> bytes:
        found = self._stream.read(size)
        self._at += len(found)
        return found

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        """The stream belongs to another."""


def _iterate(stream: IO[bytes], codec: str, start: int) -> Iterator[tuple[int, Any]]:
    """(place, record). A place is the first byte of the record, or of the compressed member that
    holds it; of several records in one member, the n-th is at its place plus n."""
    from fastwarc.stream_io import GzipReader
    from fastwarc.warc import ArchiveIterator

    source: Any = _From(stream, start)
    packed = GzipReader(source) if codec == "gzip" else None
    frame, number = -1, 0
    for record in ArchiveIterator(packed or source, parse_http=False, stream_detect=packed is None):
        place = packed.frame_start_position() if packed else record.stream_pos
        if place is None:
            place = record.stream_pos
        number = number + 1 if place == frame else 0
        frame = place
        yield start + place + number, record


def _read_record(record: Any, place: int, part: Slice) -> Row:
    """Raises `_Broken` for a record after which the next one has to be searched."""
    headers, size = record.headers, record.content_length
    origin = f"{part.name}@{place}"
    if size == 0 and not (headers.get("Content-Length") or "").strip().isdigit():
        raise _Broken("damaged_header")
    kind = int(record.record_type)
    if kind not in (_RESPONSE, _RESOURCE, _CONVERSION) or (kind == _CONVERSION) != (
        part.kind == "wet"
    ):
        skipped = "not_a_conversion" if part.kind == "wet" else "not_a_response"
        return Row(origin, place, _NAMES.get(kind, ""), skipped)
    address = headers.get("WARC-Target-URI")
    row = Row(origin, place, "", None, None, check_address(address))
    row.date = date_text(headers.get("WARC-Date"))
    language = headers.get("WARC-Identified-Content-Language")
    if language:
        row.meta = json.dumps({"language": language})
    if size > part.max_record_bytes:
        row.text, row.reason = address or "", "too_large"
        return row
    page = _read_body(record, kind)
    if row.url is None:
        return reject(origin, place, (address or "").encode(), "bad_target_uri")
    if kind == _CONVERSION:
        return _read_text(page.body, row)
    return read_page(page, row, part.extractor, part.max_record_bytes)


def _read_text(body: bytes, row: Row) -> Row:
    try:
        found = accept(row.origin, row.offset, body.decode())
    except UnicodeDecodeError:
        found = reject(row.origin, row.offset, body, "invalid_utf8")
    found.url, found.date, found.meta = row.url, row.date, row.meta
    return found


def _read_body(record: Any, kind: int) -> Page:
    """The payload; raises `_Broken` when there is less of it than the record says."""
    if kind != _RESPONSE or not record.is_http:
        content_type, charset = split_type(record.headers.get("Content-Type"))
        status, transfer, encoding = 200, "", ""
    else:
        record.parse_http()
        headers = record.http_headers
        status = headers.status_code
        content_type, charset = split_type(headers.get("Content-Type"))
        transfer = (headers.get("Transfer-Encoding") or "").lower()
        encoding = (headers.get("Content-Encoding") or "").lower()
    size = record.content_length
    body = record.reader.read()
    if len(body) < size:
        raise _Broken("wrong_content_length")
    return Page(status, content_type, charset, transfer, encoding, body)


def check_frame(stream: IO[bytes], codec: str, place: int, most: int) -> tuple[bool, int]:
    """(whether the record at `place` has the length it says, where the next one should begin)."""
    stream.seek(place)
    if codec == "gzip":
        unpack = zlib.decompressobj(31)
        packed = stream.read(most + _HEAD_BYTES)
        try:
            plain = unpack.decompress(packed, most + _HEAD_BYTES)
        except zlib.error:
            return False, place + 1
        if not unpack.eof:
            return False, place + 1
        end = place + len(packed) - len(unpack.unused_data)
        found = _measure(plain)
        return found is not None and not plain[found:].strip(), end
    if codec != "plain":
        return True, place + 1
    found = _measure(stream.read(_HEAD_BYTES))
    if found is None:
        return False, place + 1
    stream.seek(place + found)
    after = stream.read(4)
    return not after.strip() and len(after) >= 2, place + found + len(after)


def _measure(head: bytes) -> int | None:
    """Bytes of a record, from its header."""
    stop = head.find(b"\r\n\r\n")
    length = _LENGTH.search(head, 0, stop + 4) if stop >= 0 else None
    return stop + 4 + int(length[1]) if length and _RECORD.match(head) else None


def find_record(stream: IO[bytes], codec: str, start: int) -> int | None:
    """Where the next record begins, at `start` or after it."""
    if codec not in ("plain", "gzip"):
        return None
    mark = re.compile(re.escape(_GZIP)) if codec == "gzip" else _RECORD
    at = start
    while True:
        stream.seek(at)
        window = stream.read(_WINDOW)
        for match in mark.finditer(window):
            place = at + match.start()
            if match.start() > len(window) - 16 and len(window) == _WINDOW:
                break
            if _begins(stream, codec, place):
                return place
        if len(window) < _WINDOW:
            return None
        at += _WINDOW - 16


def _begins(stream: IO[bytes], codec: str, place: int) -> bool:
    if codec == "plain":
        stream.seek(max(place - 1, 0))
        return place == 0 or stream.read(1) == b"\n"
    stream.seek(place)
    try:
        plain = zlib.decompressobj(31).decompress(stream.read(1024), 16)
    except zlib.error:
        return False
    return _RECORD.match(plain) is not None
