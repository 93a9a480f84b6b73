"""A generated arithmetic textbook, its exercises, and the problems held out of both.

Everything is a pure function of a seed. The textbook teaches addition and subtraction of whole
numbers of one to `max_digits` digits in many phrasings; the exercises are chat demonstrations in
two styles: *worked* (column by column, with carries) and *mental* (the answer at once), and, where
asked for, a third, in which a calculator is called. Real demonstration data mix careful and
careless authors in the same way; which style pays is for reinforcement learning to find out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Operation = Literal["+", "-"]

PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands")
MENTAL = "I can see it."
TOOL = "calculator"

_QUESTIONS = {
    "+": (
        "What is {a} + {b}?",
        "Compute {a} + {b}.",
        "Add {a} and {b}.",
        "What is {a} plus {b}?",
        "Find the sum of {a} and {b}.",
        "How much is {a} plus {b}?",
    ),
    "-": (
        "What is {a} - {b}?",
        "Compute {a} - {b}.",
        "Work out {a} - {b}.",
        "What is {a} minus {b}?",
        "Find the difference of {a} and {b}.",
        "How much is {a} minus {b}?",
    ),
}
_STATEMENTS = {
    "+": (
        "{a} + {b} = {c}",
        "{a} plus {b} equals {c}.",
        "The sum of {a} and {b} is {c}.",
        "If you add {a} and {b} you get {c}.",
        "{a} + {b} makes {c}.",
        "A shelf holds {a} books; with {b} more it holds {c}.",
    ),
    "-": (
        "{a} - {b} = {c}",
        "{a} minus {b} equals {c}.",
        "The difference of {a} and {b} is {c}.",
        "If you subtract {b} from {a} you get {c}.",
        "{a} - {b} leaves {c}.",
        "A shelf holds {a} books; without {b} of them it holds {c}.",
    ),
}
_LESSONS = {
    "+": (
        "Write the numbers under each other and add from the right. When a column reaches ten, "
        "carry one to the next column.",
        "To add, begin with the ones. A sum of ten or more leaves its last digit and carries one.",
        "Add column by column, from right to left, and do not forget what you carry.",
    ),
    "-": (
        "Write the smaller number under the larger and subtract from the right. When the upper "
        "digit is too small, borrow ten from the next column.",
        "To subtract, begin with the ones. If a digit is too small, borrow ten from its left.",
        "Subtract column by column, from right to left, and remember what you borrow.",
    ),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One exercise `a op b` with `a >= b >= 0`, so that every answer is a whole number."""

    a: int
    op: Operation
    b: int

    def __post_init__(self) -> None:
        if self.op not in ("+", "-"):
            raise ValueError(f"op must be '+' or '-', not {self.op!r}")
        if self.b < 0 or self.a < self.b:
            raise ValueError(f"a problem needs a >= b >= 0, not a={self.a}, b={self.b}")

    @property
    def answer(self) -> int:
        return self.a + self.b if self.op == "+" else self.a - self.b

    @property
    def key(self) -> str:
        """Canonical form; two problems with one key are the same problem."""
        return f"{self.a} {self.op} {self.b}"


def draw_problem(rng: random.Random, max_digits: int) -> Problem:
    """A problem whose operands have independently drawn lengths of 1..`max_digits` digits."""
    a, b = (_draw_number(rng, rng.randint(1, max_digits)) for _ in range(2))
    op: Operation = "+" if rng.random() < 0.5 else "-"
    return Problem(max(a, b), op, min(a, b))


def _draw_number(rng: random.Random, digits: int) -> int:
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def phrase_question(problem: Problem, rng: random.Random) -> str:
    return rng.choice(_QUESTIONS[problem.op]).format(a=problem.a, b=problem.b)


def list_phrasings(problem: Problem) -> list[str]:
    """Every way in which textbook or exercises can ask or state the problem, without its answer.

    These are the needles that decontamination looks for.
    """
    rows = [q.rstrip(".?") for q in _QUESTIONS[problem.op]]
    rows += [s.split("{c}")[0] for s in _STATEMENTS[problem.op]]
    return sorted({row.format(a=problem.a, b=problem.b).strip() for row in rows})


def show_working(problem: Problem) -> str:
    """Column arithmetic from the right: `47+85; ones: 7+5=12, carry 1; tens: 4+8+1=13, carry 1`.

    The problem is restated first, the smaller number filled up with zeros, so that columns line up.
    A borrowed ten is written into the upper digit: `42-05; ones: 12-5=7, borrow 1; tens: 4-0-1=3`.
    """
    upper = str(problem.a)
    lower = str(problem.b).zfill(len(upper))
    steps, pending = [f"{upper}{problem.op}{lower}"], 0
    for place, (x, y) in enumerate(zip(map(int, upper[::-1]), map(int, lower[::-1]), strict=True)):
        mark = f"{problem.op}1" if pending else ""
        if problem.op == "+":
            total = x + y + pending
            pending, word = total // 10, "carry"
        else:
            borrowed = x - y - pending < 0
            x += 10 * borrowed
            total = x - y - pending
            pending, word = int(borrowed), "borrow"
        steps.append(f"{PLACES[place]}: {x}{problem.op}{y}{mark}={total}")
        if pending:
            steps[-1] += f", {word} 1"
    return "; ".join(steps)


def solve(problem: Problem, style: Literal["worked", "mental"]) -> str:
    """The assistant's turn: working and answer, each in its tags."""
    working = show_working(problem) if style == "worked" else MENTAL
    return f"<work>{working}</work><answer>{problem.answer}</answer>"


def write_exercise(
    problem: Problem, rng: random.Random, worked_share: float, tool_share: float = 0.0
) -> list[dict[str, Any]]:
    """One chat demonstration; `tool_share` of them (0..1) call the calculator, and `worked_share`
    of the others show their working."""
    style = rng.random()
    question = {"role": "user", "content": phrase_question(problem, rng)}
    if style < tool_share:
        return [question, *call_tool(problem)]
    worked = style - tool_share < worked_share * (1 - tool_share)
    return [
        question,
        {"role": "assistant", "content": solve(problem, "worked" if worked else "mental")},
    ]


def call_tool(problem: Problem) -> list[dict[str, Any]]:
    """The assistant's call, what the calculator returns, and the answer."""
    arguments = {"expression": f"{problem.a}{problem.op}{problem.b}"}
    call = {"type": "function", "function": {"name": TOOL, "arguments": arguments}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": str(problem.answer)},
        {"role": "assistant", "content": f"<answer>{problem.answer}</answer>"},
    ]


def write_page(rng: random.Random, max_digits: int, worked_share: float) -> str:
    """One textbook page: a lesson, statements and worked examples."""
    op: Operation = rng.choice(("+", "-"))
    lines = [rng.choice(_LESSONS[op])]
    for _ in range(rng.randint(6, 10)):
        problem = draw_problem(rng, max_digits)
        if rng.random() < worked_share:
            lines.append(f"{phrase_question(problem, rng)} {solve(problem, 'worked')}")
        else:
            row = rng.choice(_STATEMENTS[problem.op])
            lines.append(row.format(a=problem.a, b=problem.b, c=problem.answer))
    return "\n".join(lines)


def write_textbook(pages: int, seed: int, max_digits: int, worked_share: float) -> Iterator[str]:
    """`pages` pages; page i depends on (seed, i) alone, so any slice can be made anywhere."""
    for page in range(pages):
        yield write_page(random.Random(f"textbook/{seed}/{page}"), max_digits, worked_share)


def hold_out(count: int, seed: int, max_digits: int) -> list[Problem]:
    """`count` different problems for evaluation, drawn before anything else is written.

    At most half of the problems of any operand-length class are taken, so that short problems stay
    learnable. Raises `ValueError` when the space of problems is too small for `count`.
    """
    rng = random.Random(f"held-out/{seed}")
    taken: dict[str, Problem] = {}
    quota: dict[tuple[int, int, str], int] = {}
    for _ in range(200 * count):
        if len(taken) == count:
            break
        problem = draw_problem(rng, max_digits)
        shape = (len(str(problem.a)), len(str(problem.b)), problem.op)
        limit = _space(shape[0], shape[1]) // 2
        if problem.key not in taken and quota.get(shape, 0) < limit:
            taken[problem.key] = problem
            quota[shape] = quota.get(shape, 0) + 1
    if len(taken) < count:
        raise ValueError(
            f"cannot hold out {count} problems of up to {max_digits} digits; "
            "raise max_digits or lower held_out"
        )
    return list(taken.values())


def _space(digits_a: int, digits_b: int) -> int:
    """How many pairs a >= b have these digit counts."""
    sizes = [10 if d == 1 else 9 * 10 ** (d - 1) for d in (digits_a, digits_b)]
    return sizes[0] * (sizes[0] + 1) // 2 if digits_a == digits_b else sizes[0] * sizes[1]


def draw_distinct(count: int, seed: str, max_digits: int, exclude: set[str]) -> list[Problem]:
    """`count` problems (repeats allowed between draws) none of whose keys is in `exclude`."""
    rng = random.Random(seed)
    problems: list[Problem] = []
    while len(problems) < count:
        problem = draw_problem(rng, max_digits)
        if problem.key not in exclude:
            problems.append(problem)
    return problems
