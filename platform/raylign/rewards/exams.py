"""What a program is held to: the reference of a coding problem, read once.

A reference is one of

    {"entry": "f", "tests": [{"args": [1, 2], "output": 3}, ...]}      values, as JSON
    {"tests": ["assert f(1, 2) == 3", ...], "setup": "import math"}    assertions (MBPP)
    {"entry": "f", "tests": "def check(candidate): ..."}               a function (HumanEval)
    def check(candidate): ...                                          the same, ending in check(f)
    [{"input": "1 2\\n", "output": "3"}, ...]                           standard input and output

`prefix` is put before the completion's own code, `entry` may be `Class.method`.
"""

from __future__ import annotations

import ast
import builtins
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a candidate's function, and what it should give."""

    name: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    expected: Any
    exact: bool
    """As Python compares; else as JSON does, which knows no tuples, with a tolerance."""


@dataclass(frozen=True, slots=True)
class Exam:
    """Tests of one of three kinds."""

    prefix: str = ""
    calls: tuple[Call, ...] = ()
    streams: tuple[tuple[str, str], ...] = ()
    """Input, and the output that it should give."""
    setup: str = ""
    pieces: tuple[str, ...] = ()
    """Pieces of Python, each a test that passes when it raises nothing."""
    names: tuple[tuple[str, str], ...] = ()
    """Functions that the pieces call, and what the candidate calls them."""

    @property
    def count(self) -> int:
        return len(self.calls) + len(self.streams) + len(self.pieces)


@lru_cache(maxsize=4096)
def read_exam(reference: str) -> Exam:
    """Parse a reference; raises `ValueError` when it is none of the above or has no test."""
    fields: Any = reference
    if reference.lstrip()[:1] in ("{", "["):
        try:
            fields = json.loads(reference)
        except ValueError as error:
            raise ValueError(f"reference is not valid JSON: {error}") from None
    if isinstance(fields, list | str):
        fields = {"tests": fields}
    unknown = sorted(fields.keys() - {"tests", "entry", "setup", "prefix"})
    if unknown:
        raise ValueError(f"reference has {unknown[0]!r}; known are tests, entry, setup and prefix")
    prefix, entry = _text(fields, "prefix"), _text(fields, "entry")
    tests, setup = fields.get("tests"), _text(fields, "setup")
    if isinstance(tests, str):
        return _read_script(prefix, setup, tests, entry)
    if not isinstance(tests, list) or not tests:
        raise ValueError("reference has no tests")
    if all(isinstance(test, str) for test in tests):
        return _read_assertions(prefix, setup, tests)
    if all(isinstance(test, dict) for test in tests) and not setup:
        if entry:
            return Exam(prefix, calls=tuple(_read_call(test, entry) for test in tests))
        return Exam(prefix, streams=tuple(_read_stream(test) for test in tests))
    raise ValueError("reference's tests are neither all texts nor all objects")


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f"reference's {key} is of type {type(value).__name__}, not a text")
    return value


def _read_call(test: dict[str, Any], entry: str) -> Call:
    arguments, keywords = test.get("args", []), test.get("kwargs", {})
    if not (isinstance(arguments, list) and isinstance(keywords, dict) and "output" in test):
        raise ValueError("a test needs args, a list, and output, and may have kwargs")
    if set(test) - {"args", "kwargs", "output"}:
        raise ValueError(f"a test has {sorted(set(test) - {'args', 'kwargs', 'output'})[0]!r}")
    return Call(entry, tuple(arguments), keywords, test["output"], exact=False)


def _read_stream(test: dict[str, Any]) -> tuple[str, str]:
    if set(test) != {"input", "output"} or not all(isinstance(v, str) for v in test.values()):
        raise ValueError("a test needs input and output, two texts; give entry to call a function")
    return test["input"], test["output"]


def _read_assertions(prefix: str, setup: str, tests: list[str]) -> Exam:
    trees = [_parse(test) for test in tests]
    calls = [_read_simple(tree) for tree in trees]
    if not setup and all(calls):
        return Exam(prefix, calls=tuple(call for call in calls if call is not None))
    names = _find_free([_parse(setup), *trees])
    return Exam(
        prefix, setup=setup, pieces=tuple(tests), names=tuple((name, name) for name in names)
    )


def _read_simple(tree: ast.Module) -> Call | None:
    """`assert f(literals) == literal`, which needs no Python to be checked."""
    match tree.body:
        case [
            ast.Assert(
                test=ast.Compare(
                    left=ast.Call(func=ast.Name(id=name), args=arguments, keywords=keywords),
                    ops=[ast.Eq()],
                    comparators=[expected],
                )
            )
        ] if all(keyword.arg for keyword in keywords):
            try:
                return Call(
                    name,
                    tuple(ast.literal_eval(argument) for argument in arguments),
                    {str(k.arg): ast.literal_eval(k.value) for k in keywords},
                    ast.literal_eval(expected),
                    exact=True,
                )
            except (ValueError, TypeError):
                return None
    return None


def _read_script(prefix: str, setup: str, text: str, entry: str) -> Exam:
    """A text that defines `check(candidate)`, and may call it; or any other tests."""
    tree = _parse(f"{setup}\n{text}")
    defined = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"]
    if not defined:
        if not tree.body:
            raise ValueError("reference has no tests")
        names = [(name, name) for name in _find_free([tree])]
        return Exam(prefix, pieces=(ast.unparse(tree),), names=tuple(names))
    rest = []
    for node in tree.body:
        match node:
            case ast.Expr(value=ast.Call(func=ast.Name(id="check"), args=[ast.Name(id=name)])):
                entry = entry or name
            case _:
                rest.append(node)
    if not entry:
        raise ValueError("reference does not say what to check: give entry, or end in check(name)")
    tree.body = rest
    names = [(name, name) for name in _find_free([tree])]
    names.append(("candidate", entry))
    return Exam(prefix, setup=ast.unparse(tree), pieces=("check(candidate)",), names=tuple(names))


def _parse(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"reference's tests are not Python: {error}") from None


def _find_free(trees: list[ast.Module]) -> list[str]:
    """Names that the tests use and do not make: functions of the candidate's."""
    used, made = set(), set(dir(builtins)) | {"__name__"}
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.arg(arg=name):
                made.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                made.add(name)
            case ast.ExceptHandler(name=str(name)):
                made.add(name)
            case ast.alias(name=name, asname=asname):
                made.add(asname or name.split(".")[0])
    return sorted(used - made)
