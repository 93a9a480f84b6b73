"""Real English that every installation has: the documentation inside Python itself."""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from raylign.data.extraction.text import split_passages, split_sections
from raylign.data.sources.rows import Row, reject

# Tests, demonstrations and installed packages: not documentation, or not the same everywhere.
_SKIPPED = {
    "__pycache__",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "turtledemo",
}
PASSAGE_CHARS = 4000


def read_topics() -> Iterator[Row]:
    """The language reference behind `help()`, by section."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        for offset, section in split_sections(topics[name]):
            for inner, passage in split_passages(section, PASSAGE_CHARS):
                yield Row(name, offset + inner, passage)


def list_modules() -> list[Path]:
    """Source files of the standard library, sorted by their path below it."""
    library = sysconfig.get_path("stdlib")
    found: list[Path] = []
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda file: file.relative_to(library).as_posix())


def read_docstrings(start: int, stop: int) -> Iterator[Row]:
    """Docstrings of modules `start`..`stop` of `list_modules`, grouped into documents.

    A document gathers neighbouring docstrings of one module up to `PASSAGE_CHARS` characters and is
    named after its first: `json/decoder.py:JSONDecoder`.
    """
    library = Path(sysconfig.get_path("stdlib"))
    for file in list_modules()[start:stop]:
        name = file.relative_to(library).as_posix()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what the library's own source does is not ours
                tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError) as error:
            yield reject(name, 0, str(error).encode(), "invalid_python")
            continue
        yield from _group(name, tree)


def _group(module: str, tree: ast.Module) -> Iterator[Row]:
    """Rows of about `PASSAGE_CHARS` characters out of one module's docstrings.

    The offset of a row is its number in the module.
    """
    title = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parts: list[str] = []
    first, chars, number = "", 0, 0
    for name, text in _list_docstrings(tree):
        heading = f"{title}.{name}" if name else title
        for _, passage in split_passages(f"{heading}\n\n{text}", PASSAGE_CHARS):
            if parts and chars + len(passage) > PASSAGE_CHARS:
                yield Row(f"{module}:{first}" if first else module, number, "\n\n\n".join(parts))
                number, parts, chars = number + 1, [], 0
            first = first if parts else name
            parts.append(passage)
            chars += len(passage)
    if parts:
        yield Row(f"{module}:{first}" if first else module, number, "\n\n\n".join(parts))


def _list_docstrings(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a tree, in the order of the source, also of what is defined
    under `if`, `try` and the like."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield prefix, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _list_docstrings(child, f"{prefix}.{child.name}" if prefix else child.name)
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _list_docstrings(child, prefix)
