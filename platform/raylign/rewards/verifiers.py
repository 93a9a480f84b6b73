r"""Rewards that check an answer: `(completion, reference) -> {"correct": 0 or 1, ...}`.

A policy under training is an adversary: whatever a verifier accepts by accident will be found. So
the strict one leaves no second reading of a completion, patterns are linear in its length, and
numbers too long to mean anything are wrong rather than an error. A *reference* that is no answer is
a mistake in the data and raises `ValueError`, so that the sample is rejected and not scored 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction

RewardFunction = Callable[[str, str], float | Mapping[str, float]]
"""(completion, reference) -> the reward, or its named parts."""

_TAGS = ("<work>", "</work>", "<answer>", "</answer>")
_LAYOUT = re.compile(r"<work>.*</work><answer>-?[0-9]+</answer>", re.DOTALL)
_INTEGER = re.compile(r"-?[0-9]{1,100}")
_NUMBER = re.compile(
    r"(?<![0-9.])"  # not inside a number
    r"(?:(?<![0-9A-Za-z)\]])-)?\$?"  # a minus that subtracts nothing
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_LONGEST_NUMBER = 100


def verify_arithmetic(completion: str, reference: str) -> dict[str, float]:
    """Parts of `<work>...</work><answer>N</answer>`.

    `format` is 1 if the completion is exactly that: each tag once, nothing before, between or after
    the two elements, N an integer. `correct` is 1 if there is a single answer element and what it
    holds (outer blanks aside) is an integer equal to `reference`. Raises `ValueError` when
    `reference` is not an integer.
    """
    expected = _parse_integer(reference)
    if expected is None:
        raise ValueError(f"reference {reference!r} is not an integer")
    once = all(completion.count(tag) == 1 for tag in _TAGS)
    answer = _only_answer(completion)
    return {
        "correct": float(answer is not None and _parse_integer(answer) == expected),
        "format": float(once and _LAYOUT.fullmatch(completion) is not None),
    }


def verify_number(completion: str, reference: str) -> dict[str, float]:
    r"""Compare the completion's final number with the reference's, exactly.

    The final number is what follows the last `####` (as in GSM8K) or stands in the last `\boxed{}`,
    whichever comes later, and else the last number of the text. Thousands separators, `$`, decimals
    and fractions (`a/b`, `\frac{a}{b}`) are understood. `format` is 1 if the answer was marked in
    one of the two ways. Raises `ValueError` when `reference` holds no number.
    """
    expected = _final_number(reference)[0]
    if expected is None:
        raise ValueError(f"reference {reference[-80:]!r} holds no number")
    value, marked = _final_number(completion)
    return {"correct": float(value == expected), "format": float(marked)}


def verify_exact(completion: str, reference: str) -> dict[str, float]:
    """`correct` is 1 if both texts are the same but for blanks around them."""
    return {"correct": float(completion.strip() == reference.strip())}


VERIFIERS: dict[str, RewardFunction] = {
    "arithmetic": verify_arithmetic,
    "number": verify_number,
    "exact": verify_exact,
}


def _only_answer(completion: str) -> str | None:
    """What the answer element holds; None unless there is exactly one."""
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    before, _, rest = completion.partition("<answer>")
    return None if "</answer>" in before else rest.partition("</answer>")[0]


def _parse_integer(text: str) -> int | None:
    text = text.strip(" \n\t")
    return int(text) if _INTEGER.fullmatch(text) else None


def _final_number(text: str) -> tuple[Fraction | None, bool]:
    """The final number, and whether it was marked as the answer."""
    hashes, box = text.rfind("####"), text.rfind("\\boxed{")
    if max(hashes, box) < 0:
        return _parse_number(text, last=True), False
    if hashes > box:
        answer = text[hashes + 4 :].split("\n", 1)[0]
    else:
        answer = _read_braces(text, box + len("\\boxed{"))
    value = _parse_number(answer, last=False)
    return value, value is not None


def _read_braces(text: str, start: int) -> str:
    """What stands between `start`, just inside an opening brace, and its closing one."""
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return ""


def _parse_number(text: str, *, last: bool) -> Fraction | None:
    """The last number of `text`; with `last` False its only one, and None if there are several."""
    found = _NUMBER.findall(_LATEX_FRACTION.sub(r"\1/\2", text))
    if not found or (len(found) > 1 and not last):
        return None
    digits = re.sub(r"[$,]", "", found[-1])
    numerator, _, denominator = digits.partition("/")
    if len(digits) > _LONGEST_NUMBER or (denominator and int(denominator) == 0):
        return None
    return Fraction(numerator) / int(denominator or 1)
