"""Arithmetic with a tool: `<tool>12*34</tool>` is answered with `408`."""

from __future__ import annotations

import re

from raylign.environments.environment import Outcome
from raylign.records import Prompt

LONGEST_EXPRESSION = 64
LARGEST_NUMBER = 10**18

_CALL = re.compile(r"<tool>(.*?)</tool>", re.DOTALL)
_TOKEN = re.compile(r"\s*(\d+|[-+*()])")
_NUMBER = re.compile(r"-?\d+")


class Calculator:
    """A turn's last call is worked out and its result shown; a turn without one ends the episode,
    with reward 1 where its last number is the prompt's reference, else 0."""

    def __init__(self, call_penalty: float = 0.0) -> None:
        """`call_penalty` is taken off for every call that cannot be worked out."""
        self._penalty = call_penalty
        self._reference = ""

    def reset(self, prompt: Prompt) -> None:
        self._reference = prompt.reference

    def step(self, completion: str) -> Outcome:
        calls = _CALL.findall(completion)
        if not calls:
            numbers = _NUMBER.findall(completion)
            right = bool(numbers) and numbers[-1] == self._reference.strip()
            return Outcome(reward=float(right), done=True)
        try:
            return Outcome(observation=str(calculate(calls[-1])))
        except ValueError as error:
            reward = -self._penalty if self._penalty else None
            return Outcome(observation=f"error: {error}", reward=reward)


def calculate(expression: str) -> int:
    """Value of integers joined by + - * and parentheses.

    Raises `ValueError` for anything else, for more than 64 characters, and for a number beyond
    10^18 on the way: neither time nor memory is at the mercy of who writes the expression.
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError("too long")
    tokens: list[str] = []
    place = 0
    text = expression.rstrip()
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise ValueError("not integers with + - *")
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
    while tokens[place] == "*":
        other, place = _factor(tokens, place + 1)
        value = _bounded(value * other)
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


def _bounded(value: int) -> int:
    if abs(value) > LARGEST_NUMBER:
        raise ValueError("too large")
    return value
