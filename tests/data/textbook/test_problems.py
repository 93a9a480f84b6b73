from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from raylign.config import TextbookConfig, UserError
from raylign.data.decontamination.index import build_index, list_needles
from raylign.data.textbook.arithmetic import MENTAL, hold_out
from raylign.data.textbook.problems import Problems, draw_problems, write_problems
from raylign.environments.calculator import calculate

CONFIG = TextbookConfig(exercises=3000, prompts=200, held_out=100)


def test_worked_share_is_that_of_the_larger_operands_digits() -> None:
    shares = (0.9, 0.5, 0.0)
    drawn = draw_problems(CONFIG.model_copy(update={"exercise_worked_share": shares}), 0)
    worked: Counter[int] = Counter()
    total: Counter[int] = Counter()
    for row in drawn.exercises:
        digits = len(row["key"].split()[0])
        total[digits] += 1
        worked[digits] += MENTAL not in row["messages"][1]["content"]
    for digits, share in enumerate(shares, start=1):
        assert worked[digits] / total[digits] == pytest.approx(share, abs=0.06)


def test_last_share_serves_longer_operands() -> None:
    config = CONFIG.model_copy(update={"exercise_worked_share": (0.0, 1.0), "exercises": 200})
    for row in draw_problems(config, 0).exercises:
        worked = MENTAL not in row["messages"][1]["content"]
        assert worked == (len(row["key"].split()[0]) > 1)


def test_tool_share_is_that_of_the_larger_operands_digits_and_comes_first() -> None:
    shares = {"exercise_tool_share": (0.8, 0.5, 0.0), "exercise_worked_share": (0.0, 0.6)}
    called: Counter[int] = Counter()
    worked: Counter[int] = Counter()
    total: Counter[int] = Counter()
    for row in draw_problems(CONFIG.model_copy(update=shares), 0).exercises:
        digits, answer = len(row["key"].split()[0]), row["messages"][1]
        total[digits] += 1
        called[digits] += "tool_calls" in answer
        worked[digits] += "ones:" in answer["content"]
        if "tool_calls" in answer:
            [call] = answer["tool_calls"]
            expression = call["function"]["arguments"]["expression"]
            assert expression == row["key"].replace(" ", "")
            assert str(calculate(expression)) == row["messages"][2]["content"]
    for digits, (tool, shown) in enumerate([(0.8, 0.0), (0.5, 0.3), (0.0, 0.6)], start=1):
        assert called[digits] / total[digits] == pytest.approx(tool, abs=0.06)
        assert worked[digits] / total[digits] == pytest.approx(shown, abs=0.06)


def test_demonstrations_without_a_tool_are_what_they_were() -> None:
    """What runs of earlier versions were made from can be made again."""
    drawn = draw_problems(CONFIG, 0)
    digest = hashlib.sha256(json.dumps(drawn.exercises).encode()).hexdigest()
    assert digest == "97f443f6e429560e74eb3876ca7b1ff516624b1fb5235debe13ea09658f61a90"


def test_drawing_depends_on_the_seed_alone() -> None:
    assert draw_problems(CONFIG, 1) == draw_problems(CONFIG, 1)
    assert draw_problems(CONFIG, 1) != draw_problems(CONFIG, 2)


def test_rows(tmp_path: Path) -> None:
    drawn = draw_problems(CONFIG, 0)
    held = hold_out(100, 0, 3)
    assert drawn.held_out == held
    index = build_index(list_needles(held), 13)
    write_problems(drawn, index, tmp_path)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == drawn.prompts
    for row, problem in zip(drawn.questions, held, strict=True):
        assert row["key"] == problem.key and row["reference"] == str(problem.answer)
        assert str(problem.a) in row["prompt"] and str(problem.b) in row["prompt"]
    assert not {p.key for p in held} & {row["key"] for row in drawn.exercises + drawn.prompts}


@pytest.mark.parametrize("part", ["exercises", "prompts"])
@pytest.mark.parametrize("by", ["key", "text"])
def test_overlap_is_refused_by_key_and_by_text(tmp_path: Path, part: str, by: str) -> None:
    drawn = draw_problems(CONFIG, 0)
    held = drawn.held_out[0]
    text = f"What is {held.a} {held.op} {held.b}?" if by == "text" else "What?"
    key = held.key if by == "key" else "0 + 0"
    messages = [{"role": "user", "content": text}]
    row = {"messages": messages, "prompt": text, "key": key, "id": "x", "reference": "0"}
    bad: Problems = dataclasses.replace(drawn, **{part: [*getattr(drawn, part), row]})
    index = build_index(list_needles(drawn.held_out), 13)
    with pytest.raises(RuntimeError, match=f"1 {part} hold held-out problems"):
        write_problems(bad, index, tmp_path)
    assert not list(tmp_path.iterdir())


def test_too_many_held_out() -> None:
    with pytest.raises(UserError, match=r"prepare\.textbook\.held_out=500"):
        draw_problems(TextbookConfig(max_digits=1, held_out=500), 0)
