r"""Rewards that check an answer: `(completion, reference) -> {"correct": 0 or 1, ...}`.

A policy under training is an adversary: whatever a verifier accepts by accident will be found. So
the strict one leaves no second reading of a completion, patterns are linear in its length, and
numbers too long to mean anything are wrong rather than an error. A *reference* that is no answer is
a mistake in the data and raises `ValueError`, so that the sample is rejected and not scored 0.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from raylign.config import UserError

RewardFunction = Callable[..., float | Mapping[str, float]]
"""(completion, reference) -> the reward, or its named parts. One that has parameters `prompt` or
`trajectory` is given the prompt's text and the whole `Trajectory` by these names."""

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
_POWER = re.compile(
    r"([0-9.]{1,40})(?:[eE]|\s?(?:\\times|\\cdot|\*|\u00d7)\s?10\^)"
    r"(?:\{([+-]?[0-9]{1,3})\}|([+-]?[0-9]{1,3}))(?![0-9])"
)
_SAID = re.compile(r"answer\s{0,4}(?:is|:)\s{0,4}", re.IGNORECASE)


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


def build_exact(*, ignore_case: bool = False) -> RewardFunction:
    """`verify_exact`, or the same of texts without upper case."""

    def verify_folded(completion: str, reference: str) -> dict[str, float]:
        return verify_exact(completion.casefold(), reference.casefold())

    return verify_folded if ignore_case else verify_exact


def build_numeric(*, relative: float = 1e-6, absolute: float = 0.0) -> RewardFunction:
    """Like `verify_number`, but right within a share of the reference or an absolute distance.

    Powers of ten (`1.5e-3`, `1.5 \\times 10^{-3}`) are understood. Raises `UserError` for a
    tolerance below 0.
    """
    if not (0 <= relative < math.inf and 0 <= absolute < math.inf):
        raise UserError(f"relative={relative} and absolute={absolute} must be 0 or more")

    def verify_numeric(completion: str, reference: str) -> dict[str, float]:
        expected = _final_number(_spell_powers(reference))[0]
        if expected is None:
            raise ValueError(f"reference {reference[-80:]!r} holds no number")
        value, marked = _final_number(_spell_powers(completion))
        room = max(Fraction(absolute), Fraction(relative) * abs(expected))
        right = value is not None and abs(value - expected) <= room
        return {"correct": float(right), "format": float(marked)}

    return verify_numeric


def build_regex(*, pattern: str, seconds: float = 1.0) -> RewardFunction:
    """`correct` is 1 if `pattern` is found in the completion, and what its group `answer` (or its
    only group) holds, where it has one, equals the reference but for blanks around.

    The last place where the pattern is found counts. A search that takes longer than `seconds`
    raises `TimeoutError`, so that the sample is rejected: the pattern is at fault. Raises
    `UserError` for a pattern that is none, or has several groups and none called `answer`.
    """
    regex: Any = importlib.import_module("regex")  # unlike re, it can be stopped, in threads too

    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise UserError(f"pattern={pattern!r} is no regular expression: {error}") from None
    group = "answer" if "answer" in compiled.groupindex else compiled.groups
    if group not in ("answer", 0, 1):
        raise UserError(f"pattern={pattern!r} has several groups; call one (?P<answer>...)")

    def verify_regex(completion: str, reference: str) -> dict[str, float]:
        found = None
        for found in compiled.finditer(completion, timeout=seconds):  # noqa: B007
            pass
        if found is None:
            return {"correct": 0.0}
        right = group == 0 or (found[group] or "").strip() == reference.strip()
        return {"correct": float(right)}

    return verify_regex


def build_format(*, tags: str = "think,answer") -> RewardFunction:
    """`format` is 1 if the completion is `<a>...</a><b>...</b>` for `tags` a,b in this order, each
    once, with blanks at most before, between and after. Raises `UserError` for names that are none.
    """
    names = tags.split(",")
    if len(set(names)) < len(names) or not all(re.fullmatch(r"[A-Za-z][\w-]*", n) for n in names):
        raise UserError(f"tags={tags!r}: give different names with commas between, as think,answer")

    def verify_format(completion: str, reference: str) -> dict[str, float]:
        rest = completion
        for name in names:
            opening, closing = f"<{name}>", f"</{name}>"
            if completion.count(opening) != 1 or completion.count(closing) != 1:
                return {"format": 0.0}
            before, _, rest = rest.partition(opening)
            _, end, rest = rest.partition(closing)
            if before.strip() or not end:
                return {"format": 0.0}
        return {"format": float(not rest.strip())}

    return verify_format


def build_choice(*, letters: str = "ABCDE") -> RewardFunction:
    """The letter of a multiple choice: in the last `\\boxed{}`, after the last `####` or `answer
    is`/`answer:`, or all of the completion; with brackets, a dot or `\\text{}` around or not.

    `format` is 1 if a letter was found. Raises `ValueError` when the reference is no such letter,
    `UserError` when `letters` are not letters.
    """
    if not (letters.isascii() and letters.isalpha() and letters.isupper()):
        raise UserError(f"letters={letters!r}: give upper-case letters, such as ABCD")
    shape = re.compile(rf"(?:\\text\{{)?[(\[*]*([{letters}])(?![A-Za-z0-9'])", re.IGNORECASE)

    def read_letter(text: str) -> str | None:
        found = shape.match(text.strip())
        return found[1].upper() if found else None

    def verify_choice(completion: str, reference: str) -> dict[str, float]:
        expected = read_letter(reference)
        if expected is None:
            raise ValueError(f"reference {reference[:80]!r} is none of {letters}")
        marks = [(completion.rfind("####"), 4), (completion.rfind("\\boxed{"), 7)]
        said = [found.span() for found in _SAID.finditer(completion)]
        marks += [(start, end - start) for start, end in said[-1:]]
        start, length = max(marks)
        short = len(completion.strip()) <= 8
        letter = read_letter(completion[start + length :]) if start >= 0 else None
        if start < 0 and short:
            letter = read_letter(completion)
        return {"correct": float(letter == expected), "format": float(letter is not None)}

    return verify_choice


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
    answer = find_answer(text)
    if answer is None:
        return _parse_number(text, last=True), False
    value = _parse_number(answer, last=False)
    return value, value is not None


def find_answer(text: str) -> str | None:
    r"""What follows the last `####` in its line or stands in the last `\boxed{}`, whichever comes
    later; None when neither is there."""
    hashes, box = text.rfind("####"), text.rfind("\\boxed{")
    if max(hashes, box) < 0:
        return None
    if hashes > box:
        return text[hashes + 4 :].split("\n", 1)[0]
    return _read_braces(text, box + len("\\boxed{"))


def _spell_powers(text: str) -> str:
    """Powers of ten as fractions of integers, which the rest of this file reads."""

    def spell(found: re.Match[str]) -> str:
        digits, exponent = found[1], int(found[2] or found[3])
        try:
            value = Fraction(digits) * Fraction(10) ** exponent
        except ValueError:
            return found[0]
        return str(value)

    return _POWER.sub(spell, text)


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
