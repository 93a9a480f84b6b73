"""Which columns of public evaluation sets hold questions and answers, and how to reach them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which a set is published; a column is a path, `a.b` being `b` inside `a`."""

    question: tuple[str, ...]
    answer: tuple[str, ...] = ()

    def choose(self, texts: str) -> tuple[str, ...]:
        """The columns of `texts`: "question", "answer" or "both"."""
        chosen = {"question": self.question, "answer": self.answer}
        return chosen[texts] if texts in chosen else self.question + self.answer


_CHOICES = ("choices.text",)

LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    "agieval": (Layout(("query",), ("choices",)), Layout(("question",), ("options",))),
    "aime": (Layout(("problem",), ("solution",)), Layout(("Problem",), ("Solution",))),
    "arc_challenge": (
        Layout(("question",), _CHOICES),
        Layout(("question.stem",), ("question.choices.text",)),
    ),
    "arc_easy": (
        Layout(("question",), _CHOICES),
        Layout(("question.stem",), ("question.choices.text",)),
    ),
    "bbh": (Layout(("input",), ("target",)),),
    "boolq": (Layout(("question",), ("passage",)),),
    "commonsense_qa": (
        Layout(("question",), _CHOICES),
        Layout(("question.stem",), ("question.choices.text",)),
    ),
    "copa": (Layout(("premise",), ("choice1", "choice2")),),
    "drop": (Layout(("question",), ("passage",)),),
    "gpqa": (Layout(("Question",), ("Correct Answer",)),),
    "gsm8k": (Layout(("question",), ("answer",)),),
    "hellaswag": (Layout(("ctx",), ("endings",)),),
    "hendrycks_math": (Layout(("problem",), ("solution",)),),
    "humaneval": (Layout(("prompt",), ("canonical_solution",)),),
    "ifeval": (Layout(("prompt",)),),
    "lambada": (Layout(("text",)),),
    "mbpp": (Layout(("text",), ("code",)), Layout(("prompt",), ("code",))),
    "minerva_math": (Layout(("problem",), ("solution",)),),
    "mmlu": (
        Layout(("question",), ("choices",)),
        Layout(("question",), ("choice0", "choice1", "choice2", "choice3")),
        Layout(("question",), ("A", "B", "C", "D")),
        Layout(("0",), ("1", "2", "3", "4")),
    ),
    "mmlu_pro": (Layout(("question",), ("options",)),),
    "nq_open": (Layout(("question",), ("answer",)),),
    "openbookqa": (
        Layout(("question_stem",), _CHOICES),
        Layout(("question.stem",), ("question.choices.text",)),
    ),
    "piqa": (Layout(("goal",), ("sol1", "sol2")),),
    "race": (Layout(("article", "question"), ("options",)),),
    "sciq": (Layout(("question",), ("correct_answer",)),),
    "social_iqa": (Layout(("context", "question"), ("answerA", "answerB", "answerC")),),
    "squad": (Layout(("question",), ("answers.text",)),),
    "triviaqa": (
        Layout(("question",), ("answer.aliases",)),
        Layout(("Question",), ("Answer.Aliases",)),
    ),
    "truthfulqa": (
        Layout(("Question",), ("Best Answer",)),
        Layout(("question",), ("mc2_targets.choices",)),
        Layout(("question",), ("mc2_targets",)),
        Layout(("question",), ("correct_answers", "incorrect_answers")),
    ),
    "winogrande": (Layout(("sentence",), ("option1", "option2")),),
}
"""Task to the layouts it is found in, as named by lm-eval, most specific first. Columns that are
numbers belong to csv files without header (hendrycks/test)."""


def find_layouts(task: str) -> tuple[Layout, ...]:
    """Of `task`, or of the family that its name begins with (`mmlu_anatomy`); () when unknown."""
    known = [name for name in LAYOUTS if task == name or task.startswith(f"{name}_")]
    return LAYOUTS[max(known, key=len)] if known else ()


def has_column(row: Any, column: str) -> bool:
    """Whether the path leads anywhere in `row`."""
    return _has(row, _split(row, column))


def list_texts(row: Any, column: str) -> Iterator[str]:
    """The texts at the path: each element of a list, the keys of an object of marks (0 or 1).

    Numbers count as they are written; null and empty texts do not. Raises `KeyError` when the path
    leads nowhere and `TypeError` when it ends in something else.
    """
    return _walk(row, _split(row, column))


def _split(row: Any, column: str) -> Sequence[str]:
    whole = isinstance(row, dict) and column in row
    return (column,) if whole else column.split(".")


def _has(value: Any, path: Sequence[str]) -> bool:
    if not path or value is None:
        return True
    if isinstance(value, list):
        return all(_has(element, path) for element in value)
    return isinstance(value, dict) and path[0] in value and _has(value[path[0]], path[1:])


def _walk(value: Any, path: Sequence[str]) -> Iterator[str]:
    if value is None:
        return
    if isinstance(value, list):
        for element in value:
            yield from _walk(element, path)
    elif path:
        if not isinstance(value, dict):
            raise KeyError(path[0])
        yield from _walk(value[path[0]], path[1:])
    elif isinstance(value, dict) and set(value.values()) <= {0, 1}:
        yield from (key for key in value if key.strip())
    elif isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)
    else:
        raise TypeError(type(value).__name__)
