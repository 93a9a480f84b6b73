"""Arithmetic with a tool: `<calculator>12*34</calculator>` is answered with `408`."""

from __future__ import annotations

import re

from raylign.environments.environment import Outcome
from raylign.records import Prompt

LONGEST_EXPRESSION = 64
LARGEST_NUMBER = 10**18

_OPENING = "<calculator>"
_CALL = re.compile(r"<calculator>(.*?)</calculator>", re.DOTALL)
_TOKEN = re.compile(r"\s*(\d+|[-+*/()])")
_NUMBER = re.compile(r"-?\d+")


class Calculator:
    """A turn's last call is worked out and its result shown; a turn without one ends the episode,
    with reward 1 where its last number is the prompt's reference, else 0.

    What is shown depends on the call alone. A call is written as the plain chat template writes one
    of a tool called `calculator`, so that demonstrations of it teach this form.
    """

    def __init__(self, call_penalty: float = 0.0) -> None:
        """`call_penalty` is taken off for every call that cannot be worked out."""
        self._penalty = call_penalty
        self._reference = ""

    def reset(self, prompt: Prompt) -> None:
        self._reference = prompt.reference

    def step(self, completion: str) -> Outcome:
        if _OPENING not in completion:
            numbers = _NUMBER.findall(completion)
            right = bool(numbers) and numbers[-1] == self._reference.strip()
            return Outcome(reward=float(right), done=True)
        calls = _CALL.findall(completion)
        try:
            if not calls:
                raise ValueError("a call that does not end")
            return Outcome(observation=str(calculate(calls[-1])), reward=0.0)
        except ValueError as error:
            return Outcome(observation=f"error: {error}", reward=0.0 - self._penalty)


def calculate(expression: str) -> int:
    """Value of integers joined by + - * / and parentheses.

    Raises `ValueError` for anything else, for a quotient that is no integer, for more than 64
    characters, and for a number beyond 10^18 on the way: neither time nor memory is at the mercy of
    who writes the expression.
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError("too long")
    tokens: list[str] = []
    place = 0
    text = expression.rstrip()
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise ValueError("not integers with + - * /")
        tokens.append(found.group(1))
        place = found.end()
    tokens.append("")
    value, end = _sum(tokens, 0)
    if tokens[end]:
        raise ValueError("not an expression")
    return value


def _sum(tokens: list[str], place: int) -> tuple[int, int]:
    """Value of a sum, and where it ends."""
    value, place = _product(tokens, place)
    while tokens[place] in ("+", "-"):
        sign = 1 if tokens[place] == "+" else -1
        other, place = _product(tokens, place + 1)
        value = _bounded(value + sign * other)
    return value, place


def _product(tokens: list[str], place: int) -> tuple[int, int]:
    value, place = _factor(tokens, place)
    while tokens[place] in ("*", "/"):
        sign = tokens[place]
        other, place = _factor(tokens, place + 1)
        value = _bounded(value * other) if sign == "*" else _divide(value, other)
    return value, place


def _factor(tokens: list[str], place: int) -> tuple[int, int]:
    token = tokens[place]
    if token == "-":
        value, place = _factor(tokens, place + 1)
        return -value, place
    if token == "(":
        value, place = _sum(tokens, place + 1)
        if tokens[place] != ")":
            raise ValueError("not an expression")
        return value, place + 1
    if not token.isdigit():
        raise ValueError("not an expression")
    return _bounded(int(token)), place + 1


def _divide(value: int, other: int) -> int:
    if other == 0:
        raise ValueError("division by zero")
    if value % other:
        raise ValueError("not a whole number")
    return value // other


def _bounded(value: int) -> int:
    if abs(value) > LARGEST_NUMBER:
        raise ValueError("too large")
    return value
