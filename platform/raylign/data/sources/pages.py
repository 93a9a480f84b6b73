"""A web page as a crawler stored it: from HTTP response to main text, or to why there is none."""

from __future__ import annotations

import functools
import io
import re
import zlib
from dataclasses import dataclass

from raylign.data.extraction.main_text import extract
from raylign.data.sources.rows import Row, reject

_HTML = ("text/html", "application/xhtml+xml")
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]*:[^\x00-\x1f\x7f\ufffd]+")
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([^\s\"';]+)", re.IGNORECASE)
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]{0,200}\r?\n")


@dataclass(frozen=True, slots=True)
class Page:
    """What came over HTTP."""

    status: int | None
    content_type: str
    """Lower case, without parameters."""
    charset: str | None
    transfer: str
    """The headers `Transfer-Encoding` and `Content-Encoding`, or ""."""
    encoding: str
    body: bytes


def read_page(page: Page, row: Row, extractor: str, most: int) -> Row:
    """`row`, with the page's text or the reason why it has none."""
    if page.status != 200:
        return _reject(row, page, "damaged_http" if page.status is None else "http_status")
    if page.content_type not in _HTML and not _looks_like_html(page):
        return _reject(row, page, "not_html")
    body = undo_encodings(page, most)
    if body is None:
        return _reject(row, page, "broken_encoding")
    row.text = extract(body, page.charset, extractor)
    if not row.text:
        row.reason = "no_main_text"
    return row


def _looks_like_html(page: Page) -> bool:
    return not page.content_type and page.body[:512].lstrip().lower().startswith(b"<")


def _reject(row: Row, page: Page, reason: str) -> Row:
    found = reject(row.origin, row.offset, page.body[:200], reason)
    found.url, found.date, found.meta = row.url, row.date, row.meta
    return found


def check_address(address: str | None) -> str | None:
    """An address that can be kept, or None; the angle brackets of old crawlers are taken off."""
    if address is None:
        return None
    address = address.strip()
    if address.startswith("<") and address.endswith(">"):
        address = address[1:-1]
    return address if _SCHEME.fullmatch(address) else None


@functools.lru_cache(256)
def split_type(value: str | None) -> tuple[str, str | None]:
    """(content type, charset) of a header `Content-Type`."""
    kind, _, rest = (value or "").partition(";")
    match = _CHARSET.search(rest)
    return kind.strip().lower(), match[1] if match else None


def parse_response(raw: bytes) -> Page:
    """An HTTP response as it came over the line; `status` is None when it is none."""
    head, mark, body = raw.partition(b"\r\n\r\n")
    if not mark:
        head, _, body = raw.partition(b"\n\n")
    status_line, *lines = head.decode("latin-1").splitlines() or [""]
    match = re.match(r"HTTP/\d(?:\.\d)? (\d{3})(?: |$)", status_line)
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers.setdefault(name.strip().lower(), value.strip())
    kind, charset = split_type(headers.get("content-type"))
    return Page(
        int(match[1]) if match else None,
        kind,
        charset,
        headers.get("transfer-encoding", "").lower(),
        headers.get("content-encoding", "").lower(),
        body,
    )


def undo_encodings(page: Page, most: int) -> bytes | None:
    """The body as the page's author wrote it, of at most `most` bytes; None when it is broken.

    Crawlers often undo an encoding and keep its header, so a body without the encoding's marks is
    taken as it is.
    """
    body = page.body
    if "chunked" in page.transfer and _CHUNK.match(body):
        unchunked = _join_chunks(body)
        if unchunked is None:
            return None
        body = unchunked
    if not page.encoding or page.encoding == "identity" or body.lstrip()[:1] == b"<":
        return body
    if page.encoding in ("gzip", "x-gzip", "deflate"):
        return _inflate(body, most)
    if page.encoding == "br":
        from fastwarc.stream_io import BrotliReader

        try:
            return BrotliReader(io.BytesIO(body)).read(most)
        except OSError:
            return None
    return None


def _join_chunks(body: bytes) -> bytes | None:
    """What the chunks hold; a last chunk that breaks off is kept, one with a wrong size is not."""
    parts: list[bytes] = []
    at = 0
    while match := _CHUNK.match(body, at):
        size = int(match[1], 16)
        parts.append(body[match.end() : match.end() + size])
        at = match.end() + size
        if size == 0 or at >= len(body):
            return b"".join(parts)
        if body[at : at + 2] == b"\r\n":
            at += 2
        elif body[at : at + 1] == b"\n":
            at += 1
        else:
            return None
    return None if at < len(body) else b"".join(parts)


def _inflate(body: bytes, most: int) -> bytes | None:
    """gzip, zlib or bare deflate."""
    for bits in (47, -15):
        unpack = zlib.decompressobj(bits)
        try:
            plain = unpack.decompress(body, most)
        except zlib.error:
            continue
        # What was cut off in transit is still a page, one that unpacks without end is not.
        return None if unpack.unconsumed_tail and not unpack.eof else plain
    return None
