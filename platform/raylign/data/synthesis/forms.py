"""Whether an answer has the form that its style asked for."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable

_MARK = r"^[#*_>\s]*({})[ \t]*\d*[.)]?[*_]*[ \t]*(?::[*_]*|$)"
_QUESTIONS = re.compile(_MARK.format("question|answer|q|a"), re.IGNORECASE | re.MULTILINE)
_WORKED = re.compile(_MARK.format("exercise|problem|solution"), re.IGNORECASE | re.MULTILINE)
_FENCE = re.compile(r"^```[ \t]*(?:python|py)?[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def has_questions(text: str) -> bool:
    """Questions, each directly followed by its answer, none of them empty."""
    return _alternates(text, _QUESTIONS, ("answer", "a"))


def has_solution(text: str) -> bool:
    """Exercises, each directly followed by its solution, none of them empty."""
    return _alternates(text, _WORKED, ("solution",))


def has_function(text: str) -> bool:
    """Python code, in fenced blocks or on its own, that parses and defines a function with a
    docstring and a body that does something. Nothing is run."""
    code = "\n".join(_FENCE.findall(text)) or text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node)
        and any(not _is_empty(statement) for statement in node.body[1:])
        for node in ast.walk(tree)
    )


def unwrap_code(text: str) -> str:
    """What stands inside the fence, of an answer that is nothing but one block of code."""
    found = _FENCE.fullmatch(text.strip())
    return found[1].rstrip() if found and "```" not in found[1] else text


FORMS: dict[str, Callable[[str], bool]] = {
    "prose": lambda text: True,
    "questions": has_questions,
    "worked": has_solution,
    "python": has_function,
}
"""Check of each form of answer."""


def _alternates(text: str, mark: re.Pattern[str], seconds: tuple[str, ...]) -> bool:
    marks = list(mark.finditer(text))
    if not marks or len(marks) % 2:
        return False
    ends = [m.start() for m in marks[1:]] + [len(text)]
    for index, (found, end) in enumerate(zip(marks, ends, strict=True)):
        if (found[1].lower() in seconds) != bool(index % 2):
            return False
        if not text[found.end() : end].strip():
            return False
    return True


def _is_empty(statement: ast.stmt) -> bool:
    """`pass`, `...`, or another literal standing alone."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass)
