"""Mathematics is compared as such, and no answer can stop, mislead or use the grader."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylign.config import UserError
from raylign.rewards.outcomes import SourceFailure
from raylign.rewards.symbolic import MathVerifier

installed = importlib.util.find_spec("math_verify") is not None
needed = pytest.mark.skipif(not installed, reason="math-verify is not installed")


@pytest.fixture(scope="module")
def verify() -> Iterator[MathVerifier]:
    verifier = MathVerifier(seconds=1)
    yield verifier
    verifier.close()


@pytest.mark.skipif(installed, reason="math-verify is installed")
def test_without_math_verify_the_remedy_is_named() -> None:
    with pytest.raises(UserError, match="pip install 'math-verify"):
        MathVerifier()


@needed
@pytest.mark.parametrize(
    ("completion", "reference", "correct", "marked"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1, 1),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1, 1),
        (r"\boxed{x^2+2x}", "(x+1)^2", 0, 1),
        (r"\boxed{[1,2)}", "[1,2)", 1, 1),
        (r"\boxed{(1,2]}", "[1,2)", 0, 1),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", 1, 1),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1, 1),
        (r"\boxed{3}, no, \boxed{4}", "3", 0, 1),
        ("#### 1,234", "1234", 1, 1),
        ("It is $x=3$.", "3", 1, 0),
        ("The answer is 3/4.", r"Long, but \boxed{\frac34}", 1, 0),
        ("no idea", "3", 0, 0),
        (r"\boxed{}", "3", 0, 0),
        ("", "3", 0, 0),
        (r"\boxed{" + "1+" * 300 + "1}", "301", 0, 1),
        (r"\boxed{__import__('os').system('touch pwned')}", "3", 0, 1),
        (r"\boxed{" + "{" * 200 + "3" + "}" * 200 + "}", "4", 0, 1),
    ],
)
def test_answers(
    completion: str, reference: str, correct: int, marked: int, verify: MathVerifier
) -> None:
    assert verify(completion, reference) == {"correct": correct, "format": marked}
    assert not Path("pwned").exists()


@needed
@pytest.mark.parametrize("answer", [r"9^{9^{9^{9}}}", r"1000000000!", r"\sum_{n=1}^{10^7}\frac1n"])
def test_an_answer_that_never_ends_is_wrong_and_the_next_is_judged(
    answer: str, verify: MathVerifier
) -> None:
    started = time.monotonic()
    assert verify(rf"\boxed{{{answer}}}", "3")["correct"] == 0
    assert time.monotonic() - started < 15
    assert verify(r"\boxed{\frac{6}{2}}", "3")["correct"] == 1


@needed
@pytest.mark.parametrize("reference", ["", "???", r"\frac{", "x" * 1000])
def test_a_reference_that_is_no_mathematics_is_an_error(
    reference: str, verify: MathVerifier
) -> None:
    with pytest.raises(ValueError, match="cannot be read as mathematics"):
        verify(r"\boxed{3}", reference)


@needed
def test_it_works_in_threads(verify: MathVerifier) -> None:
    found: list[dict[str, float]] = []

    def judge(number: int) -> None:
        found.append(verify(rf"\boxed{{\frac{{{number}}}{{2}}}}", "1"))

    threads = [threading.Thread(target=judge, args=(number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(parts["correct"] for parts in found) == [0, 0, 1]


@needed
def test_a_grader_that_is_killed_says_nothing_of_the_answer(verify: MathVerifier) -> None:
    assert verify(r"\boxed{\frac{6}{2}}", "3")["correct"] == 1
    assert verify._process is not None
    os.kill(verify._process._process.pid, 9)
    with pytest.raises(SourceFailure, match="was killed"):
        verify(r"\boxed{\frac{4}{2}}", "3")
    assert verify(r"\boxed{\frac{6}{2}}", "3")["correct"] == 1
