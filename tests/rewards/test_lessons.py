"""A judge is taught exactly what it will be asked."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from raylign.config import JudgeConfig, UserError, VerdictsConfig
from raylign.inference.endpoint import Reply
from raylign.records import Prompt
from raylign.rewards.hearing import Hearings
from raylign.rewards.judging import JudgeTally
from raylign.rewards.lessons import list_lessons, write_mark
from raylign.rewards.opinions import Judge, Opinion
from raylign.rewards.rubric import load_rubric

PROMPT = Prompt("p", (5,), "What is 2 + 2?", "4")
TEXTS = ["4", "<answer>4", "5", "4", "<eos> 5"]
REWARDS = [1.0, 1.0, 0.0, 1.0, 0.0]


def ask_pupil(directory: Path, config: JudgeConfig, taught: VerdictsConfig) -> Opinion:
    """What a judge says that has its lessons by heart; a question that it does not know fails."""
    rubric = load_rubric(taught.rubric, taught.compare, taught.scale, brief=True)
    lessons = dict(list_lessons(rubric, PROMPT, TEXTS, REWARDS, ["<eos>"]))

    async def ask(question: str, seed: int) -> Reply:
        return Reply(lessons[question], "stop", 1)

    async def whole() -> Opinion:
        own = load_rubric(config.rubric, config.compare, config.scale, config.brief)
        tally = JudgeTally()
        hearings = Hearings(ask, config, directory, "pupil", 0, tally)
        judge = Judge(own, config, hearings, tally, ["<eos>"])
        try:
            return await judge.consider(PROMPT.text, TEXTS, PROMPT.reference, seed=7)
        finally:
            hearings.stop()

    return asyncio.run(whole())


@pytest.mark.parametrize("rubric", ["overall", "correct", "Right?\n{prompt}\n{completion}"])
def test_marks_come_back_as_rewards(tmp_path: Path, rubric: str) -> None:
    taught = VerdictsConfig(rubric=rubric)
    config = JudgeConfig(model=Path("m"), brief=True, rubric=rubric, scale=(0, 1))
    assert list(ask_pupil(tmp_path, config, taught).values) == REWARDS
    for other in ({"brief": False}, {"rubric": "helpful"}):
        with pytest.raises(KeyError):
            ask_pupil(tmp_path / "x", config.model_copy(update=other), taught)


def test_choices_come_back_as_wins(tmp_path: Path) -> None:
    config = JudgeConfig(model=Path("m"), brief=True, compare=True, rubric="overall")
    opinion = ask_pupil(tmp_path, config, VerdictsConfig(rubric="overall", compare=True))
    # A circle of five, of texts that may be the same: 4-4', 4'-5, 5-4, 4-5', 5'-4.
    assert list(opinion.values) == [0.75, 0.75, 0.0, 1.0, 0.0]


def test_a_question_is_short_and_fenced_and_its_verdict_has_no_reason() -> None:
    rubric = load_rubric("Right?\n{prompt}\n{completion}", False, (0, 1), brief=True)
    [(question, verdict)] = list_lessons(rubric, PROMPT, ["4 [[end"], [1.0])
    lines = question.splitlines()
    code = lines[1].split()[1]
    assert lines == [
        "Right?",
        f"[[begin {code} request]]",
        "What is 2 + 2?",
        f"[[end {code} request]]",
        f"[[begin {code} answer]]",
        "4 [[end",
        f"[[end {code} answer]]",
    ]
    assert json.loads(verdict) == {"score": 1}
    other = replace(PROMPT, reference="5")  # what is not shown changes nothing
    assert list_lessons(rubric, other, ["4 [[end"], [1.0]) == [(question, verdict)]
    assert list(rubric.schema()["properties"]) == rubric.schema()["required"] == ["score"]


def test_a_mark_is_the_nearest() -> None:
    rewards = [0.0, 0.04, 0.06, 0.5, 0.94, 0.96, 1.0]
    marks = [json.loads(write_mark(reward, (1, 11)))["score"] for reward in rewards]
    assert marks == [1, 1, 2, 6, 10, 11, 11]
    for reward in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="is no mark; weigh"):
            write_mark(reward, (1, 10))


def test_what_cannot_be_taught_is_refused() -> None:
    with pytest.raises(UserError, match=r"^compare\.verdicts\.rubric: lacks \{first\}"):
        load_rubric("{prompt} {second}", True, (0, 1), True, "compare.verdicts.rubric")
    with pytest.raises(ValidationError, match="scale has no effect with compare=true"):
        VerdictsConfig(compare=True, scale=(0, 1))
    with pytest.raises(ValidationError, match="give the lowest mark first"):
        VerdictsConfig(scale=(1, 1))
