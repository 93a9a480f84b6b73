"""Text as it comes, made uniform: encoding form, control characters, white space, passages."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

# Controls (but not tab and line feed), soft hyphen, zero-width space, word joiner, byte-order mark.
# The zero-width joiners U+200C and U+200D stay: Persian, Indic scripts and emoji need them.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff]")
_LINE_END = re.compile("\r\n?|[\v\f\x85\u2028\u2029]")
_WIDE_BLANK = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_SPECIAL = re.compile(
    f"[{_INVISIBLE.pattern[1:-1]}{_WIDE_BLANK.pattern[1:-1]}\r\v\f\x85\u2028\u2029]"
)
# Invisible characters below 128, in the form that `str.translate` is fast with.
_CONTROLS = {code: None for code in range(128) if _INVISIBLE.match(chr(code))}
_EMPTY_LINES = re.compile(r"\n{3,}")
_UNDERLINE = re.compile(r"(=|-|\*|~|\^|\"){3,}")


def clean_text(text: str) -> str:
    """NFC, no control or invisible characters, `\\n` line ends, and no idle white space.

    Blanks inside and at the start of a line are kept: they carry meaning in code and tables.
    Cleaning a clean text changes nothing.
    """
    if text.isascii():
        if "\r" in text or "\v" in text or "\f" in text:
            text = _LINE_END.sub("\n", text)
        text = text.translate(_CONTROLS)
    else:
        text = unicodedata.normalize("NFC", text)
        if _SPECIAL.search(text):
            text = _WIDE_BLANK.sub(" ", text)
            text = _LINE_END.sub("\n", text)
            text = _INVISIBLE.sub("", text)
            # An invisible character may have stood between two parts of one.
            text = unicodedata.normalize("NFC", text)
    if " \n" in text or "\t\n" in text:
        text = "\n".join([line.rstrip(" \t") for line in text.split("\n")])
    text = text.rstrip()
    if "\n\n\n" in text:
        text = _EMPTY_LINES.sub("\n\n", text)
    return text.strip("\n")


def is_special(char: str) -> bool:
    """Whether `clean_text` takes away or replaces this character, wherever it stands."""
    return _SPECIAL.match(char) is not None


def is_encodable(text: str) -> bool:
    """Whether `text` is valid Unicode: a lone surrogate, which JSON can smuggle in, is not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def split_sections(text: str) -> Iterator[tuple[int, str]]:
    """(offset, section) at every underlined heading, the heading opening its section.

    Offsets count characters; joining the sections gives back the text.
    """
    lines = text.splitlines(keepends=True)
    starts = [0]
    offset = 0
    for number, line in enumerate(lines):
        below = lines[number + 1].rstrip("\n") if number + 1 < len(lines) else ""
        title = line.rstrip("\n")
        if (
            offset
            and title.strip()
            and _UNDERLINE.fullmatch(below)
            and len(below) >= len(title) - 1
        ):
            starts.append(offset)
        offset += len(line)
    for start, stop in zip(starts, [*starts[1:], len(text)], strict=True):
        if stop > start:
            yield start, text[start:stop]


def split_passages(text: str, most: int) -> Iterator[tuple[int, str]]:
    """(offset, passage) of about `most` characters, cut where paragraphs end.

    Offsets count characters; joining the passages gives back the text. A paragraph longer than
    `most` is cut at line ends, and a longer line stays whole.
    """
    start = stop = 0
    for piece in _list_pieces(text, most):
        if stop > start and stop + len(piece) - start > most:
            yield start, text[start:stop]
            start = stop
        stop += len(piece)
    if stop > start:
        yield start, text[start:stop]


def _list_pieces(text: str, most: int) -> Iterator[str]:
    """Paragraphs with the empty lines after them; long ones by line."""
    for paragraph in re.split(r"(?<=\n\n)(?!\n)", text):
        if len(paragraph) > most:
            yield from paragraph.splitlines(keepends=True)
        else:
            yield paragraph
