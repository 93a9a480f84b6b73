"""The record every reader yields."""

from __future__ import annotations

from dataclasses import dataclass

from raylign.data.extraction.text import is_encodable

# A rejected row is kept for inspection, not for training: this much of it is enough.
REJECTED_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a source, good or not."""

    origin: str
    """Where it stood, in words: file and line, page, module and name."""
    offset: int
    """Where it stood, as a number that is unique in its file."""
    text: str
    reason: str | None = None
    """Why it cannot be used, if it cannot."""


def accept(origin: str, offset: int, text: object) -> Row:
    """A row of `text`, rejected unless that is a valid string."""
    if not isinstance(text, str):
        return reject(origin, offset, repr(text).encode(), "not_text")
    if not is_encodable(text):
        return reject(origin, offset, text.encode(errors="backslashreplace"), "invalid_unicode")
    return Row(origin, offset, text)


def reject(origin: str, offset: int, raw: bytes, reason: str) -> Row:
    """A row that cannot be used, with the beginning of what was found."""
    return Row(origin, offset, raw.decode(errors="backslashreplace")[:REJECTED_CHARS], reason)
