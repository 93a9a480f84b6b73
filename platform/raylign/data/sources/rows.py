"""The record every reader yields, and the reasons for which one is not a document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from raylign.data.extraction.text import is_encodable
from raylign.data.sources.columns import Columns, pick

# A rejected row is kept for inspection, not for training: this much of it is enough.
REJECTED_CHARS = 2000

SKIPPED = frozenset(
    {
        "empty",
        "http_status",
        "no_main_text",
        "not_a_conversion",
        "not_a_response",
        "not_html",
    }
)
"""Whole and readable, but not a document: what a crawl is full of."""

DAMAGED = frozenset(
    {
        "broken_encoding",
        "bad_target_uri",
        "damaged_compression",
        "damaged_header",
        "damaged_http",
        "damaged_record",
        "damaged_row_group",
        "invalid_json",
        "invalid_python",
        "invalid_unicode",
        "invalid_utf8",
        "no_column",
        "not_an_object",
        "not_text",
        "too_large",
        "truncated_record",
        "unreadable_shard",
        "wrong_content_length",
    }
)
"""Could not be read as what it ought to be; `prepare.max_damaged_share` counts these."""


@dataclass(slots=True)
class Row:
    """One record of a source, good or not."""

    origin: str
    """Where it stood, in words: file and line, page, module and name."""
    offset: int
    """Where it stood, as a number that is unique in its file."""
    text: str
    reason: str | None = None
    """Why it cannot be used, if it cannot: one of `SKIPPED` or `DAMAGED`."""
    domain: str | None = None
    url: str | None = None
    date: str | None = None
    """ISO 8601."""
    meta: str | None = None
    """JSON object with sorted keys."""


def accept(origin: str, offset: int, text: object) -> Row:
    """A row of `text`, rejected unless that is a valid string."""
    if not isinstance(text, str):
        return reject(origin, offset, repr(text).encode(), "not_text")
    if not is_encodable(text):
        return reject(origin, offset, text.encode(errors="backslashreplace"), "invalid_unicode")
    return Row(origin, offset, text)


def reject(origin: str, offset: int, raw: bytes, reason: str) -> Row:
    """A row that cannot be used, with the beginning of what was found."""
    excerpt = raw[: 4 * REJECTED_CHARS].decode(errors="backslashreplace")[:REJECTED_CHARS]
    return Row(origin, offset, excerpt, reason)


def describe(row: Row, record: Mapping[str, Any], columns: Columns) -> Row:
    """The row with what the record's other columns say; a value that is no text is left out."""
    row.url = _as_text(pick(record, columns.url)) if columns.url else None
    row.date = date_text(pick(record, columns.date)) if columns.date else None
    row.domain = _as_text(pick(record, columns.domain)) if columns.domain else None
    kept = columns.kept()
    if kept:
        row.meta = meta_text({name: pick(record, name) for name in kept})
    return row


def _as_text(value: object) -> str | None:
    return value if isinstance(value, str) and value and is_encodable(value) else None


def date_text(value: object) -> str | None:
    """ISO 8601 of a date: of a `datetime`, of seconds or milliseconds since 1970, or of a text."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value / 1000 if abs(value) > 1e11 else value
        try:
            return datetime.fromtimestamp(seconds, UTC).isoformat()
        except (ValueError, OverflowError, OSError):
            return None
    text = _as_text(value)
    if text is None or not text[:4].isdigit():
        return None
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return None
    return text


def meta_text(values: Mapping[str, object]) -> str | None:
    """JSON with sorted keys, without what is null; null when nothing is left."""
    kept = {name: value for name, value in values.items() if value is not None}
    if not kept:
        return None
    return json.dumps(kept, sort_keys=True, default=str)
