from __future__ import annotations

import pytest

from raylign.config.synthesis import OutputFilterConfig
from raylign.data.synthesis.answers import Answer
from raylign.data.synthesis.filters import (
    REASONS,
    OutputFilter,
    line_repeat_share,
    ngram_repeat_share,
    prompt_share,
    read_answer,
)
from raylign.data.synthesis.forms import FORMS, unwrap_code

GOOD = (
    "Rivers carry sediment towards the sea. The faster the water, the larger the grains that it "
    "can lift, which is why a mountain stream rolls boulders while a slow river carries mud.\n"
    "Where the current slackens the load is dropped, heaviest first, and a delta begins to grow."
)
FUNCTION = 'def double(x: int) -> int:\n    """Twice x: double(2) is 4."""\n    return 2 * x'


def judge(text: str, finish: str = "stop", form: str = "prose", **changes: object) -> list[str]:
    config = OutputFilterConfig.model_validate(changes)
    return OutputFilter(config).judge(text, finish, "Write about rivers.", form)


def test_a_good_output_is_accepted() -> None:
    assert judge(GOOD) == []


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        (GOOD, "length", "cut_off"),
        (GOOD, "abort", "aborted"),
        (GOOD[:150], "stop", "too_short"),
        (GOOD + " More." * 9000, "stop", "too_long"),
        ("I'm sorry, but I cannot write this. " + GOOD, "stop", "refusal"),
        ("I\u2019m unable to help. " + GOOD, "stop", "refusal"),
        ("As an AI language model, I think: " + GOOD, "stop", "refusal"),
        ("Sure! " + GOOD, "stop", "preamble"),
        ("Here is a section for your textbook:\n\n" + GOOD, "stop", "preamble"),
        ("**Certainly, " + GOOD, "stop", "preamble"),
        (GOOD + "\nAgain.\nAgain.\nAgain.\nAgain.", "stop", "repeated_lines"),
        (GOOD + " and so on it goes once more" * 20, "stop", "repeated_ngrams"),
    ],
)
def test_each_fault_has_its_reason(text: str, finish: str, reason: str) -> None:
    assert reason in judge(text, finish)
    assert reason in REASONS


@pytest.mark.parametrize(
    "opener",
    [
        "Surely the river bends. ",
        "Here is where the river bends. ",
        "I can swim, said the otter. ",
        "As an airport grows, ",
        "Sorry streams ",
        "OK Corral lies by a river. ",
    ],
)
def test_prose_that_resembles_an_opener_is_not_one(opener: str) -> None:
    assert judge(opener + GOOD) == []


def test_all_reasons_are_listed_in_their_order() -> None:
    assert judge("", "length") == ["cut_off", "empty", "too_short"]
    found = judge("Sure! a b", "length", "python")
    assert found == ["cut_off", "too_short", "preamble", "not_python"]


def test_every_filter_can_be_relaxed() -> None:
    assert judge("I'm sorry", "length", finished=False, min_chars=0, openers=False) == []
    assert judge("x", form="python", min_chars=0, answers=False) == []


def test_copies_of_accepted_outputs_are_rejected() -> None:
    filters = OutputFilter(OutputFilterConfig())
    assert filters.judge(GOOD, "length", "", "prose") == ["cut_off"]
    assert filters.judge(GOOD, "stop", "", "prose") == []
    assert filters.judge(GOOD.upper().replace(" ", "  "), "stop", "", "prose") == ["duplicate"]
    assert filters.judge(GOOD + " End.", "stop", "", "prose") == []
    loose = OutputFilter(OutputFilterConfig(duplicates=False))
    assert [loose.judge(GOOD, "stop", "", "prose") for _ in range(2)] == [[], []]


def test_what_was_not_asked_has_one_reason() -> None:
    assert judge("", "prompt_too_long") == ["prompt_too_long"]


def test_an_output_may_not_be_its_prompt() -> None:
    filters = OutputFilter(OutputFilterConfig())
    assert filters.judge(GOOD, "stop", f"Draw on this: {GOOD}", "prose") == ["copies_prompt"]


def test_shares_by_hand() -> None:
    assert line_repeat_share("a\nb\n\n a \nb\na") == pytest.approx(3 / 5)
    assert line_repeat_share("") == 0
    # abcab cabca: ten letters, six 5-grams, of which "a b c a b" and "b c a b c" come twice...
    words = "a b c a b c a b c a".split()  # noqa: SIM905
    grams = [tuple(words[i : i + 5]) for i in range(6)]
    assert ngram_repeat_share(" ".join(words)) == pytest.approx(1 - len(set(grams)) / 6)
    assert ngram_repeat_share("a b c d") == 0
    text = " ".join(f"w{n}" for n in range(12))  # five 8-grams
    assert prompt_share(text, " ".join(f"w{n}" for n in range(10))) == pytest.approx(3 / 5)
    assert prompt_share("a b", "a b") == 0


def test_ngrams_know_the_order_of_words() -> None:
    assert prompt_share("a b c d e f g h", "h g f e d c b a") == 0
    assert prompt_share("A b c, d e f g h", "x a b c d e f g h y") == 1


@pytest.mark.parametrize(
    ("text", "form", "document"),
    [
        ("  a b\n", "prose", "a b"),
        ("<think>hm, what?</think>\n\nAnswer", "prose", "Answer"),
        ("<think>never ends", "prose", ""),
        ("It says <think> in the middle", "prose", "It says <think> in the middle"),
        (f"```python\n{FUNCTION}\n```", "python", FUNCTION),
        (f"```python\n{FUNCTION}\n```", "prose", f"```python\n{FUNCTION}\n```"),
        (f"Look:\n```\n{FUNCTION}\n```", "python", f"Look:\n```\n{FUNCTION}\n```"),
    ],
)
def test_what_is_taken_from_an_answer(text: str, form: str, document: str) -> None:
    assert read_answer(Answer(text, "stop", 1, 0), form) == document


@pytest.mark.parametrize(
    ("form", "text", "fits"),
    [
        ("questions", "Question: Why?\nAnswer: So.\n\nQuestion: How?\nAnswer: Thus.", True),
        ("questions", "**Question 1:** Why?\n**Answer:** So.", True),
        ("questions", "## Q1:\nWhy?\n## A1:\nSo.", True),
        ("questions", "Question: Why?\nQuestion: How?\nAnswer: So.\nAnswer: So.", False),
        ("questions", "Question: Why?", False),
        ("questions", "Question: Why?\nAnswer:", False),
        ("questions", "Answer: So.\nQuestion: Why?", False),
        ("questions", "The question is the answer.", False),
        ("worked", "Exercise:\nAdd 2 and 3.\nSolution:\n5", True),
        ("worked", "### Problem 1\nAdd.\n### Solution\nDone.", True),
        ("worked", "Exercise: add\nThe solution is 5.", False),
        ("worked", "Solution: 5\nExercise: add", False),
        ("python", FUNCTION, True),
        ("python", f"Text.\n```python\n{FUNCTION}\n```\nMore.", True),
        ("python", "def f(x):\n    return x", False),
        ("python", 'def f(x):\n    """Doc."""', False),
        ("python", 'def f(x):\n    """Doc."""\n    pass\n    ...', False),
        ("python", "def f(x:\n", False),
        ("python", "x = 1\0", False),
        ("python", "Some prose.", False),
        ("prose", "", True),
    ],
)
def test_forms(form: str, text: str, fits: bool) -> None:
    assert FORMS[form](text) is fits


def test_code_is_unwrapped_only_when_it_is_all_there_is() -> None:
    two = f"```python\n{FUNCTION}\n```\n```python\nx\n```"
    assert unwrap_code(two) == two
    assert unwrap_code(f"```py\n{FUNCTION}\n```\n") == FUNCTION
