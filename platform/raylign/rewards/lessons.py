"""What a judge is taught: the questions that it will be asked, and the verdicts it should give."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence

from raylign.config import UserError
from raylign.records import Prompt
from raylign.rewards.judging import choose_pairs
from raylign.rewards.rubric import Rubric

Lesson = tuple[str, str]
"""Question and verdict."""

SEPARATORS = (",", ":")
"""Of a verdict's parts, without the blanks that JSON allows: vLLM, which holds a judge to the form
of its verdict, lets none through. A judge that had learned to write them would be led off its way
just before its mark, and might give the same to all."""


def list_lessons(
    rubric: Rubric,
    prompt: Prompt,
    completions: Sequence[str],
    rewards: Sequence[float],
    controls: Collection[str] = (),
) -> list[Lesson]:
    """Every question that a judge with this `rubric` could be asked of these `completions`, with
    the verdict that their `rewards` stand for. Nothing is asked twice; compared are each with the
    next, in both orders. `controls` are special tokens of the judge's tokenizer.

    Raises `UserError` for marks of a reward that is not in 0..1.
    """

    def ask(*shown: int) -> str:
        texts = [completions[place] for place in shown]
        return rubric.render(prompt.text, texts, prompt.reference, controls)

    if not rubric.compare:
        marks = (write_mark(reward, rubric.scale) for reward in rewards)
        return list({ask(place): mark for place, mark in enumerate(marks)}.items())
    return list(
        {
            ask(first, second): write_choice(rewards[first], rewards[second])
            for pair in choose_pairs(len(completions), 0, 0)
            for first, second in (pair, pair[::-1])
            if completions[first] != completions[second]
        }.items()
    )


def write_mark(reward: float, scale: tuple[int, int]) -> str:
    """The verdict on a completion whose reward, in 0..1, lies so far up `scale`: the nearest mark.
    Raises `UserError` for another reward."""
    if not 0 <= reward <= 1:
        raise UserError(
            f"compare.verdicts: a reward of {reward:g} is no mark; weigh compare.reward so that "
            "the totals of completions are between 0 and 1, or set compare.verdicts.compare=true"
        )
    low, high = scale
    mark = low + math.floor(reward * (high - low) + 0.5)
    return json.dumps({"score": mark}, separators=SEPARATORS)


def write_choice(first: float, second: float) -> str:
    """The verdict on two completions with these rewards."""
    better = "tie" if first == second else "first" if first > second else "second"
    return json.dumps({"better": better}, separators=SEPARATORS)
