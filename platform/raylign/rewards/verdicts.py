r"""Reading a judge's verdict: tolerant of what stands around it, strict about what it says.

A verdict is the last JSON object of a reply, and ends it. A reply whose braces do not fit is not
searched for something that would: inside of it could be what the judge quotes of the text that it
judges. What cannot be read is asked for again; it is never a low mark.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any


class Unreadable(ValueError):
    """A reply that holds no verdict; the message says what was wrong, for the judge to read."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge said."""

    value: float | None
    """score: the mark, in 0..1; compare: 1 for the first, 0 for the second, 0.5 for a tie; None
    when it abstained."""
    reason: str = ""


_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_OPENING = re.compile(r"\{(?=\s*[\"'\u201c\u2018}])")
_ENDING = re.compile(r"(?:\s|`|\.|</\w{1,20}>)*")
_NUMBER = re.compile(r"([+-]?[0-9]{1,9}(?:\.[0-9]{1,9})?)(?:\s*/\s*([0-9]{1,9}))?")
_CHOICE = re.compile(
    r"(?:the\s+)?(first|second|tie|abstain)(?:\s+(?:answer|response|completion|one))?"
)
_ABSTAIN = {"abstain", "null", "none", "n/a"}


def read_mark(text: str, scale: tuple[int, int]) -> Verdict:
    """The verdict `{"score": mark}`, brought from `scale` to 0..1.

    Raises `Unreadable`, for a mark beyond the scale too: who gives 11 of 10 did not apply it.
    """
    found = _read_object(text)
    if "score" not in found:
        raise Unreadable('the object has no "score"')
    low, high = scale
    mark = found["score"]
    if mark is None or (isinstance(mark, str) and mark.strip().lower() in _ABSTAIN):
        return Verdict(None, _reason(found))
    number = _to_number(mark, high)
    if number is None:
        raise Unreadable('"score" is not a number')
    if not low <= number <= high:
        raise Unreadable(f'"score" is not from {low} to {high}')
    return Verdict((number - low) / (high - low), _reason(found))


def read_choice(text: str) -> Verdict:
    """The verdict `{"better": "first" | "second" | "tie" | "abstain"}`. Raises `Unreadable`."""
    found = _read_object(text)
    if "better" not in found:
        raise Unreadable('the object has no "better"')
    choice = found["better"]
    match = _CHOICE.fullmatch(choice.strip().lower()) if isinstance(choice, str) else None
    if match is None:
        raise Unreadable('"better" is not one of first, second, tie and abstain')
    values: dict[str, float | None] = {"first": 1.0, "second": 0.0, "tie": 0.5, "abstain": None}
    return Verdict(values[match[1]], _reason(found))


def _read_object(text: str) -> dict[str, Any]:
    """The last object of `text`, by its keys in lower case."""
    text = _THOUGHT.sub("", text)
    if text.lstrip().startswith("<think>"):
        raise Unreadable("the thought has no end")
    # Not strict: models break lines inside of a text without saying so.
    decoder = json.JSONDecoder(
        object_pairs_hook=_to_dict, parse_constant=_refuse_constant, strict=False
    )
    found: dict[str, Any] | None = None
    start = end = 0
    while match := _OPENING.search(text, start):
        try:
            found, end = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError) as error:
            fault = str(error) if isinstance(error, Unreadable) else "the JSON is not well formed"
            raise Unreadable(fault) from None
        start = end
    if found is None:
        raise Unreadable("there is no JSON object")
    if not _ENDING.fullmatch(text, end):
        raise Unreadable("text follows the JSON object")
    return found


def _to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key.strip().lower() for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise Unreadable("the object has a key twice")
    return dict(zip(keys, (value for _, value in pairs), strict=True))


def _refuse_constant(name: str) -> float:
    raise Unreadable(f"{name} is no mark")


def _to_number(mark: Any, high: int) -> float | None:
    """A number, also as a text, or as `7/10` when the scale ends at 10."""
    if isinstance(mark, bool):
        return None
    if isinstance(mark, int | float):
        return float(mark) if abs(mark) < 1e9 and math.isfinite(mark) else None
    match = _NUMBER.fullmatch(mark.strip()) if isinstance(mark, str) else None
    if match is None or (match[2] is not None and int(match[2]) != high):
        return None
    return float(match[1])


def _reason(found: dict[str, Any]) -> str:
    reason = found.get("reason", "")
    return reason if isinstance(reason, str) else ""
