from __future__ import annotations

import random
import time

import pytest

from raylign.data.textbook.arithmetic import draw_problem, solve
from raylign.rewards.verifiers import (
    VERIFIERS,
    verify_arithmetic,
    verify_exact,
    verify_number,
)


@pytest.mark.parametrize("style", ["worked", "mental"])
def test_demonstrations_earn_everything(style: str) -> None:
    rng = random.Random(0)
    for _ in range(300):
        problem = draw_problem(rng, 4)
        text = solve(problem, style)  # type: ignore[arg-type]
        assert verify_arithmetic(text, str(problem.answer)) == {"correct": 1.0, "format": 1.0}
        assert verify_arithmetic(text, str(problem.answer + 1)) == {"correct": 0.0, "format": 1.0}


@pytest.mark.parametrize(
    ("completion", "correct", "layout"),
    [
        ("<work></work><answer>19</answer>", 1, 1),
        ("<work>a\nb</work><answer>019</answer>", 1, 1),
        ("<answer>19</answer>", 1, 0),
        ("<work>x</work><answer> 19\n</answer>", 1, 0),
        ("<work>x</work><answer>19</answer> so 19", 1, 0),
        ("So: <work>x</work><answer>19</answer>", 1, 0),
        ("<work>x</work> <answer>19</answer>", 1, 0),
        ("<work>x</work><answer>19</answer>\n", 1, 0),
        ("<work>x<work></work><answer>19</answer>", 1, 0),
        ("<answer>19</answer><work>x</work>", 1, 0),
        ("<work>x</work><answer>18</answer>", 0, 1),
        ("<work>x</work><answer>-19</answer>", 0, 1),
        ("<work>x</work><answer>" + "9" * 5000 + "</answer>", 0, 1),
        # several answers: none of them counts, wherever the right one stands
        ("<work>x</work><answer>18</answer><answer>19</answer>", 0, 0),
        ("<work>x</work><answer>19</answer><answer>19</answer>", 0, 0),
        ("".join(f"<answer>{i}</answer>" for i in range(100)), 0, 0),
        ("<answer>18<answer>19</answer>", 0, 0),
        ("<answer>19</answer></answer>", 0, 0),
        ("<answer>19</answer><answer>", 0, 0),
        ("<answer><answer>19</answer></answer>", 0, 0),
        # not an integer
        ("<work>x</work><answer></answer>", 0, 0),
        ("<work>x</work><answer>19.0</answer>", 0, 0),
        ("<work>x</work><answer>+19</answer>", 0, 0),
        ("<work>x</work><answer>1 9</answer>", 0, 0),
        ("<work>x</work><answer>1_9</answer>", 0, 0),
        ("<work>x</work><answer>18 19</answer>", 0, 0),
        ("<work>x</work><answer>12+7</answer>", 0, 0),
        ("<work>x</work><answer>１９</answer>", 0, 0),
        ("<work>x</work><answer>١٩</answer>", 0, 0),
        # broken elements
        ("</answer>19<answer>", 0, 0),
        ("</answer><answer>19", 0, 0),
        ("<work>x</work><answer>19", 0, 0),
        ("<Answer>19</Answer>", 0, 0),
        ("19", 0, 0),
        ("", 0, 0),
    ],
)
def test_an_adversarial_completion_gets_what_it_is_worth(
    completion: str, correct: int, layout: int
) -> None:
    assert verify_arithmetic(completion, "19") == {"correct": correct, "format": layout}


def test_negative_answers() -> None:
    assert verify_arithmetic("<work>x</work><answer>-7</answer>", "-7")["correct"] == 1
    assert verify_arithmetic("<work>x</work><answer>7</answer>", "-7")["correct"] == 0


@pytest.mark.parametrize("reference", ["", "19.5", "nineteen"])
def test_a_reference_that_is_no_integer_is_an_error_and_no_zero(reference: str) -> None:
    with pytest.raises(ValueError, match="is not an integer"):
        verify_arithmetic("<work>x</work><answer>19</answer>", reference)


@pytest.mark.parametrize(
    ("completion", "reference", "correct", "marked"),
    [
        ("She has 3 and buys 4.\n#### 7", "He counts 7.\n#### 7", 1, 1),
        ("#### $1,234.50", "1234.5", 1, 1),
        ("#### 3\n#### 4", "4", 1, 1),
        (r"so \boxed{42}", "42", 1, 1),
        (r"\boxed{41}, no, \boxed{42}", "42", 1, 1),
        (r"\boxed{\frac{1}{2}}", "0.5", 1, 1),
        (r"\boxed{\text{about } 42}", "42", 1, 1),
        (r"\boxed{.5}", "1/2", 1, 1),
        (r"\boxed{-5}", "-5", 1, 1),
        (r"#### 3 then \boxed{4}", "4", 1, 1),
        ("The total is 12, so the answer is 15.", "15", 1, 0),
        ("it is 20-5", "5", 1, 0),
        ("it falls to -5 degrees", "-5", 1, 0),
        ("about 1,000,000 people", "1000000", 1, 0),
        # wrong, or a second reading
        (r"\boxed{1, 2, 42}", "42", 0, 0),
        ("#### 1 2 42", "42", 0, 0),
        (r"42 \boxed{}", "42", 0, 0),
        (r"42 \boxed{41", "41", 0, 0),
        ("42 ####", "42", 0, 0),
        ("1/0", "1", 0, 0),
        ("no number", "0", 0, 0),
        ("", "0", 0, 0),
        ("4" * 5000, "4", 0, 0),
        ("1e999999999", "1", 0, 0),
    ],
)
def test_numbers(completion: str, reference: str, correct: int, marked: int) -> None:
    assert verify_number(completion, reference) == {"correct": correct, "format": marked}


def test_a_reference_without_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="holds no number"):
        verify_number("7", "seven")


def test_exact() -> None:
    assert verify_exact(" Paris\n", "Paris") == {"correct": 1.0}
    assert verify_exact("paris", "Paris") == {"correct": 0.0}


@pytest.mark.parametrize("name", ["arithmetic", "number"])
@pytest.mark.parametrize(
    "piece",
    [
        "1",
        "1,",
        "111,",
        ",111",
        "-",
        "1.",
        "1/",
        "<work>",
        "<answer>",
        "\\frac{",
        "\\boxed{",
        "{",
        "$",
    ],
)
def test_no_completion_takes_long(name: str, piece: str) -> None:
    started = time.perf_counter()
    VERIFIERS[name](piece * 20_000, "1")
    assert time.perf_counter() - started < 1.0


def test_random_text_never_raises() -> None:
    rng = random.Random(1)
    pieces = [
        "<work>",
        "</work>",
        "<answer>",
        "</answer>",
        "19",
        "-",
        " ",
        "\\boxed{",
        "}",
        "#### ",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 9)))
        for name in ("arithmetic", "number"):
            parts = VERIFIERS[name](text, "19")
            assert isinstance(parts, dict) and set(parts.values()) <= {0.0, 1.0}
        if verify_arithmetic(text, "19")["correct"]:
            assert text.count("<answer>") == text.count("</answer>") == 1
