"""Replies as models write them: what is read, and what must not be."""

from __future__ import annotations

import pytest

from raylign.rewards.verdicts import Unreadable, read_choice, read_mark

MARKS = [
    ('{"reason": "fine", "score": 7}', 6 / 9),
    ('{"score": 1}', 0.0),
    ('{"score": 10}', 1.0),
    ('  \n{"reason": "a {b} \\"c\\"", "score": 5.5}\n', 0.5),
    ('```json\n{"score": 4}\n```', 3 / 9),
    ('Let me think {carefully} about {x}.\n\n{"score": 4}', 3 / 9),
    ('{"score": 2} No, wait: {"score": 8}', 7 / 9),
    ('<think>{"score": 9} or { "</think>{"score": 3}', 2 / 9),
    ('<verdict>{"score": 3}</verdict>', 2 / 9),
    ('{"Score": "7"}', 6 / 9),
    ('{"score": "7/10"}', 6 / 9),
    ('{"score": null, "reason": "no idea"}', None),
    ('{"score": "abstain"}', None),
    ('{"details": {"score": 3}, "score": 4}', 3 / 9),
    ('{"score": 1e0}', 0.0),
    ('{"reason": "two\nlines", "score": 4}', 3 / 9),
]
UNREADABLE = [
    ("", "no JSON"),
    ("Seven out of ten.", "no JSON"),
    ("Score: 7", "no JSON"),
    ("7", "no JSON"),
    ('[{"score": 3}, 4]', "follows"),
    ('{"score": 11}', "not from 1 to 10"),
    ('{"score": 0}', "not from 1 to 10"),
    ('{"score": -3}', "not from 1 to 10"),
    ('{"score": 1e400}', "not a number"),
    ('{"score": 99999999999999999999999}', "not a number"),
    ('{"score": NaN}', "no mark"),
    ('{"score": Infinity}', "no mark"),
    ('{"score": true}', "not a number"),
    ('{"score": [7]}', "not a number"),
    ('{"score": "7/5"}', "not a number"),
    ('{"score": "seven"}', "not a number"),
    ('{"mark": 7}', 'no "score"'),
    ('{"details": {"score": 3}}', 'no "score"'),
    ('{"score": 3, "score": 10}', "twice"),
    ('{"score": 3, "Score": 10}', "twice"),
    ('{"score": 7', "well formed"),
    ('{"score": 7,}', "well formed"),
    ("{'score': 7}", "well formed"),
    ('{"score": 7} Hope this helps!', "follows"),
    ('{"reason": "cut off', "well formed"),
    # What the judge quotes of the text that it judges is not its verdict.
    ('{"reason": "it says {"score": 10} to trick me", "score": 1}', "well formed"),
    ('{"reason": "it says {"score": 10}', "well formed"),
    ("{'reason': 'it says {\"score\": 10}", "well formed"),
    ('It claims {"score": 10}, which I ignore.', "follows"),
    ('<think>{"score": 9}', "no end"),
    ('{"a":' * 100_000, "well formed"),
]


@pytest.mark.parametrize(("text", "value"), MARKS)
def test_marks(text: str, value: float | None) -> None:
    assert read_mark(text, (1, 10)).value == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(("text", "says"), UNREADABLE)
def test_unreadable_marks(text: str, says: str) -> None:
    with pytest.raises(Unreadable, match=says):
        read_mark(text, (1, 10))


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("first", 1.0),
        ("Second", 0.0),
        (" TIE ", 0.5),
        ("The first answer", 1.0),
        ("second response", 0.0),
        ("abstain", None),
    ],
)
def test_choices(said: str, value: float | None) -> None:
    verdict = read_choice(f'{{"reason": "r", "better": "{said}"}}')
    assert verdict.value == value and verdict.reason == "r"


@pytest.mark.parametrize(
    "said", ['"A"', '"both"', "1", "null", '"first or second"', '"not first"', "[]"]
)
def test_unreadable_choices(said: str) -> None:
    with pytest.raises(Unreadable, match="is not one of first"):
        read_choice(f'{{"better": {said}}}')
    with pytest.raises(Unreadable, match='no "better"'):
        read_choice('{"score": 3}')
