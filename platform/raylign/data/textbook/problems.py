"""Demonstrations, prompts and held-out questions, and the proof that they do not overlap."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylign.config import TextbookConfig, UserError
from raylign.data.decontamination.index import Index, overlapping
from raylign.data.textbook.arithmetic import (
    Problem,
    draw_distinct,
    hold_out,
    phrase_question,
    write_exercise,
)


@dataclass(frozen=True, slots=True)
class Problems:
    """Rows of the three files, and the problems behind the last."""

    exercises: list[dict[str, Any]]
    """`messages` and `key`"""
    prompts: list[dict[str, Any]]
    """`id`, `prompt`, `reference` and `key`"""
    questions: list[dict[str, Any]]
    """The held-out problems, as prompts."""
    held_out: list[Problem]


def draw_problems(config: TextbookConfig, seed: int) -> Problems:
    """Draw the held-out problems first, then exercises and prompts without them."""
    try:
        held_out = hold_out(config.held_out, seed, config.max_digits)
    except ValueError as error:
        raise UserError(f"prepare.textbook.held_out={config.held_out}: {error}") from None
    keys = {problem.key for problem in held_out}
    drawn = draw_distinct(config.exercises, f"exercises/{seed}", config.max_digits, keys)
    exercises = []
    for number, problem in enumerate(drawn):
        rng = random.Random(f"exercise/{seed}/{number}")
        shares = (config.exercise_worked_share, config.exercise_tool_share)
        messages = write_exercise(problem, rng, *(_choose(problem, each) for each in shares))
        exercises.append({"messages": messages, "key": problem.key})
    asked = draw_distinct(config.prompts, f"prompts/{seed}", config.max_digits, keys)
    return Problems(
        exercises, _ask(asked, "prompt", seed), _ask(held_out, "held-out", seed), held_out
    )


def _choose(problem: Problem, shares: Sequence[float]) -> float:
    """The share for the length of the larger operand."""
    return shares[min(len(str(problem.a)), len(shares)) - 1]


def _ask(problems: Sequence[Problem], name: str, seed: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{name}-{number:06d}",
            "prompt": phrase_question(problem, random.Random(f"{name}/{seed}/{number}")),
            "reference": str(problem.answer),
            "key": problem.key,
        }
        for number, problem in enumerate(problems)
    ]


def write_problems(problems: Problems, index: Index, directory: Path) -> None:
    """Write `exercises.jsonl`, `prompts.jsonl` and `held_out.jsonl`.

    Raises `RuntimeError` if an exercise or prompt holds an evaluation item.
    """
    texts = ["\n".join(m["content"] for m in row["messages"]) for row in problems.exercises]
    _refuse_overlap("exercises", problems.exercises, texts, problems.held_out, index)
    texts = [row["prompt"] for row in problems.prompts]
    _refuse_overlap("prompts", problems.prompts, texts, problems.held_out, index)
    _write_lines(directory / "exercises.jsonl", problems.exercises)
    _write_lines(directory / "prompts.jsonl", problems.prompts)
    _write_lines(directory / "held_out.jsonl", problems.questions)


def _refuse_overlap(
    name: str,
    rows: Sequence[dict[str, Any]],
    texts: Sequence[str],
    held_out: Sequence[Problem],
    index: Index,
) -> None:
    """Two independent looks: at the problems' keys, and at the words of the texts."""
    keys = {problem.key for problem in held_out}
    same = [row["key"] for row in rows if row["key"] in keys]
    same += [rows[position]["key"] for position in overlapping(texts, index)]
    if same:
        raise RuntimeError(f"{len(same)} {name} hold held-out problems, such as {same[0]}")


def _write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("".join(lines), encoding="utf-8")
