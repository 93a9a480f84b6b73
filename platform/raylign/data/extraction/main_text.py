"""The main text of a web page, whatever its encoding says it is."""

from __future__ import annotations

import re

# Bytes that are also valid UTF-8 and mean something else: UTF-16 without a mark, ISO-2022.
_NOT_UTF8 = (b"\0", b"\x1b$", b"\x1b(")
_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
_SNIFFED = 4096
# A parser's time grows with the square of the depth, so a page made to be deep could hold a worker
# for hours. No page written for readers is nested like that.
MAX_DEPTH = 3000
_NESTING = re.compile(
    r"<(/?)(?:div|span|b|i|u|a|em|font|strong|big|small|center|section|article|table|ul|ol|"
    r"blockquote|form|nav|main)\b",
    re.IGNORECASE,
)


def extract(html: bytes | str, charset: str | None, extractor: str) -> str:
    """The main text; "" when there is none. `charset` is what the HTTP header claims.

    `extractor`: resiliparse (J. Bevendorff et al., ECIR 2018), trafilatura (A. Barbaresi, ACL
    2021), or `none` for all visible text.
    """
    page = decode(html, charset) if isinstance(html, bytes) else html
    if is_too_deep(page):
        return ""
    if extractor == "trafilatura":
        import trafilatura

        return trafilatura.extract(page, include_comments=False) or ""
    from resiliparse.extract.html2text import extract_plain_text

    return extract_plain_text(
        page,
        main_content=extractor != "none",
        preserve_formatting=True,
        alt_texts=False,
        comments=False,
    )


def is_too_deep(page: str) -> bool:
    """Whether more than `MAX_DEPTH` elements that hold others are open at once; counting alone
    clears almost every page."""
    tags = page.count("<")
    if tags <= MAX_DEPTH or tags - 2 * page.count("</") <= MAX_DEPTH:
        return False
    depth = 0
    for tag in _NESTING.finditer(page):
        depth = max(depth - 1, 0) if tag[1] else depth + 1
        if depth > MAX_DEPTH:
            return True
    return False


def decode(data: bytes, charset: str | None) -> str:
    """Text of a page's bytes: by its byte-order mark; as UTF-8 if it is valid; by the `charset` of
    the HTTP header; by what the page itself says; by its bytes. Wrong bytes are left out."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(name, errors="ignore")
    head = data[:_SNIFFED]
    if not any(mark in head for mark in _NOT_UTF8):
        try:
            return data.decode()
        except UnicodeDecodeError:
            pass
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    known = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    found = known or detect_encoding(data, from_html_meta=True) or "cp1252"
    return bytes_to_str(data, found, errors="ignore")
