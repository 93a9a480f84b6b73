"""A text cut into the pieces that tokens stand for, in a form that can be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from raylign.tokenization.compare import Subject
from raylign.tokenization.ranks import spell_bytes

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of a text, or text between tokens."""

    kind: Literal["text", "bytes", "unknown", "gap"]
    """`bytes`: a part of a character; `gap`: text that no token stands for."""
    text: str
    """`bytes` are written in hexadecimal."""
    id: int | None


def cut(subject: Subject, text: str) -> list[Piece]:
    """The tokens of `text` in order; the texts of all pieces that are not bytes are parts of it."""
    encoding = subject.tokenizer.encode(text, add_special_tokens=False)
    spell = {character: byte for byte, character in enumerate(spell_bytes())}
    pieces: list[Piece] = []
    place = 0
    for token, number, (start, end) in zip(
        encoding.tokens, encoding.ids, encoding.offsets, strict=True
    ):
        if start > place:
            pieces.append(Piece("gap", text[place:start], None))
        place = max(place, end)
        known = _BYTE.fullmatch(token)
        if number == subject.unknown:
            pieces.append(Piece("unknown", text[start:end], number))
        elif subject.bytewise and all(character in spell for character in token):
            pieces.append(_read(bytes(spell[character] for character in token), number))
        elif known and text[start:end] != token:
            pieces.append(_read(bytes([int(known[1], 16)]), number))
        else:
            pieces.append(Piece("text", text[start:end], number))
    if place < len(text):
        pieces.append(Piece("gap", text[place:], None))
    return pieces


def _read(data: bytes, number: int) -> Piece:
    try:
        return Piece("text", data.decode(), number)
    except UnicodeDecodeError:
        return Piece("bytes", data.hex(" ").upper(), number)
