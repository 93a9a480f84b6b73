from __future__ import annotations

import random
import time

import pytest

from raylign.data.textbook.arithmetic import draw_problem, solve
from raylign.rewards.verifiers import (
    RewardFunction,
    build_choice,
    build_format,
    build_numeric,
    build_regex,
    verify_arithmetic,
    verify_exact,
    verify_number,
)

VERIFIERS: dict[str, RewardFunction] = {
    "arithmetic": verify_arithmetic,
    "number": verify_number,
    "numeric": build_numeric(),
    "choice": build_choice(),
    "format": build_format(),
    "regex": build_regex(pattern=r"a+b"),
}


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


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("#### 3.1415", 0),
        ("#### 3.14159265", 1),
        (r"\boxed{3.141593}", 1),
        (r"\boxed{0.3141592653 \times 10^{1}}", 1),
        (r"\boxed{31.41592653e-1}", 1),
        (r"\boxed{3141592653 * 10^-9}", 1),
        ("31.4 or 3.14159265", 1),
        ("-3.14159265", 0),
        ("1e999", 0),
        ("nothing", 0),
    ],
)
def test_numbers_within_a_tolerance(text: str, right: int) -> None:
    assert build_numeric()(text, "3.14159265")["correct"] == right
    assert build_numeric(relative=0, absolute=0)("#### 0.5", "1/2")["correct"] == 1
    assert build_numeric(relative=0, absolute=1)("#### 3", "5")["correct"] == 0
    assert build_numeric(relative=0.5)("#### -3", "-5")["correct"] == 1
    with pytest.raises(ValueError, match="holds no number"):
        build_numeric()(text, "pi")


@pytest.mark.parametrize(
    ("text", "correct", "marked"),
    [
        ("B", 1, 1),
        ("(B)", 1, 1),
        ("b.", 1, 1),
        ("B) because", 0, 0),
        (r"so \boxed{B}", 1, 1),
        (r"so \boxed{\text{B}}", 1, 1),
        ("#### B", 1, 1),
        ("The answer is **B**.", 1, 1),
        ("Answer: (B) Paris", 1, 1),
        ("the answer is A. No, the answer is B", 1, 1),
        ("the answer is B. No, the answer is A", 0, 1),
        ("the answer is Bananas", 0, 0),
        ("A, B, C", 0, 1),
        ("B is what many would say, though it may be something else", 0, 0),
        ("", 0, 0),
    ],
)
def test_choices(text: str, correct: int, marked: int) -> None:
    assert build_choice()(text, "B") == {"correct": correct, "format": marked}
    with pytest.raises(ValueError, match="is none of ABCDE"):
        build_choice()(text, "Paris")


def test_patterns() -> None:
    verify = build_regex(pattern=r"result: (-?\d+)")
    assert verify("result: 3, result: 4", " 4 ") == {"correct": 1.0}
    assert verify("result: 4, result: 3", "4") == {"correct": 0.0}
    assert verify("4", "4") == {"correct": 0.0}
    assert build_regex(pattern="please")("yes, please", "whatever") == {"correct": 1.0}
    named = build_regex(pattern=r"(x|y)=(?P<answer>\d)")
    assert named("x=1 y=2", "2") == {"correct": 1.0}


def test_a_pattern_that_never_ends_is_stopped() -> None:
    started = time.perf_counter()
    with pytest.raises(TimeoutError):
        build_regex(pattern=r"(?:a|a|a)*$", seconds=0.2)("a" * 60 + "b", "x")
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("\n<think>a</think>\n <answer></answer>\n", 1),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a</think> so <answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer> end", 0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0),
        ("<think>a<answer>b</answer></think>", 0),
        ("<think>a</think><answer>b", 0),
        ("</think>a<think><answer>b</answer>", 0),
        ("", 0),
    ],
)
def test_layouts(text: str, right: int) -> None:
    assert build_format()(text, "") == {"format": right}


@pytest.mark.parametrize("name", VERIFIERS)
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
        "1e9",
        "answer is ",
        "####",
    ],
)
def test_no_completion_takes_long(name: str, piece: str) -> None:
    started = time.perf_counter()
    VERIFIERS[name](piece * 20_000, "B" if name == "choice" else "1")
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
