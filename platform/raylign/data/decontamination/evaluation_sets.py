"""Reading evaluation sets, in the layouts in which they are published."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylign.config import DecontaminateConfig, UserError
from raylign.config.decontamination import EvaluationSetConfig
from raylign.data.decontamination.columns import (
    LAYOUTS,
    find_layouts,
    has_column,
    list_texts,
)
from raylign.data.decontamination.index import HELD_OUT, Item
from raylign.data.extraction.text import clean_text

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
_NAME_CHARS = 40

Row = dict[str, Any]


def load_items(config: DecontaminateConfig, key: str = "prepare.decontaminate") -> list[Item]:
    """Every text of every evaluation set; an item is `file#row`, rows counted from 0.

    Texts are cleaned as documents are, so that a no-break blank does not hide an item. `key` is
    where `config` stands in the recipe, for messages. Raises `UserError` for a path that is
    missing or holds no items, a file that cannot be read, and columns that are not there.
    """
    min_coverage = config.min_coverage if config.method == "coverage" else 0.0
    items: list[Item] = []
    places: dict[str, str] = {}
    for number, chosen in enumerate(config.against):
        place = f"{key}.against[{number}]"
        if chosen.task == HELD_OUT:
            raise UserError(
                f"{place}.task={HELD_OUT}: is the name of the run's own; choose another"
            )
        if chosen.task in places:
            raise UserError(
                f"{place}.task={chosen.task}: {places[chosen.task]} has this name too; put the "
                "files into one directory or name one set otherwise"
            )
        places[chosen.task] = place
        found = [
            Item(chosen.task, item, _clean(text), config.min_words, min_coverage)
            for item, text in _read_set(chosen, place)
        ]
        if not found:
            raise UserError(f"{place}.path={chosen.path}: holds no items; correct the path")
        items += found
    return items


def _clean(text: str) -> str:
    # JSON can smuggle in lone surrogates; documents that have any are not read at all.
    return clean_text(text.encode(errors="replace").decode())


def _read_set(config: EvaluationSetConfig, place: str) -> Iterator[tuple[str, str]]:
    """(item, text) pairs of one set."""
    if not config.columns and not find_layouts(config.task):
        raise UserError(
            f"{place}.task={config.task}: its columns are not known{_suggest(config.task, LAYOUTS)}"
            f"; give {place}.columns (known: {', '.join(sorted(LAYOUTS))})"
        )
    for file, name in _list_files(config.path, place):
        rows = _read_rows(file, place)
        if not rows:
            continue
        if isinstance(rows[0], list):
            rows = _name_columns(rows, config, file, place)
        columns = _choose_columns(rows[0], config, file, place)
        for number, row in enumerate(rows):
            for column in columns:
                for text in _list_row(row, column, file, number, place):
                    yield f"{name}#{number}", text


def _list_files(path: Path, place: str) -> list[tuple[Path, str]]:
    """Files with their names in reports, in order."""
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise UserError(f"{place}.path={path}: not one of {', '.join(_SUFFIXES)}; convert it")
        return [(path, path.name)]
    if not path.is_dir():
        near = [str(path.parent / name.name) for name in _list_siblings(path)]
        raise UserError(f"{place}.path={path}: does not exist{_suggest(str(path), near)}")
    files = sorted(file for file in path.rglob("*") if file.name.endswith(_SUFFIXES))
    if not files:
        raise UserError(f"{place}.path={path}: holds none of {', '.join(_SUFFIXES)} files")
    return [(file, file.relative_to(path).as_posix()) for file in files]


def _list_siblings(path: Path) -> list[Path]:
    return sorted(path.parent.iterdir()) if path.parent.is_dir() else []


def _read_rows(file: Path, place: str) -> list[Any]:
    """Objects; for csv, lists of fields, the header (if there is one) first."""
    try:
        if file.name.endswith(".parquet"):
            return pq.read_table(file).to_pylist()
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8-sig")
        kind = file.name.removesuffix(".gz").rpartition(".")[2]
        if kind == "csv":
            lines = io.StringIO(text, newline="")  # breaks at \n alone, not at U+0085
            return [row for row in csv.reader(lines, strict=True) if row]
        if kind == "jsonl":
            rows = [_parse(line, file, n, place) for n, line in _number_lines(text)]
        else:
            rows = _find_rows(json.loads(text), file, place)
    except (OSError, EOFError, ValueError, zlib.error, csv.Error, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{place}: {file} cannot be read ({reason}); repair or remove it") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{place}: row {number} of {file} is not an object; repair the file")
    return rows


def _number_lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines, which breaks at U+2028 and the like too.
    return ((n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())


def _parse(line: str, file: Path, number: int, place: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: {file}:{number} is not JSON ({error}); repair it") from None


def _find_rows(value: Any, file: Path, place: str) -> list[Any]:
    """The rows of a json file: a list, the only list of an object, or columns of equal length."""
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]):
            return lists[0]
        if lists and len(lists) == len(value) and len({len(inner) for inner in lists}) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]
    if isinstance(value, list):
        return value
    raise UserError(f"{place}: {file} holds no list of rows; convert it to jsonl")


def _name_columns(
    rows: list[list[str]], config: EvaluationSetConfig, file: Path, place: str
) -> list[Row]:
    """Rows of a csv file as objects: by the names of its header, or by number without one."""
    header = [name.strip() for name in rows[0]]
    wanted = _list_candidates(config)
    named = any(set(columns) <= set(header) for columns in wanted)
    numbered = any(all(c.isdecimal() and int(c) < len(header) for c in cs) for cs in wanted)
    names = header if named or not numbered else [str(n) for n in range(len(header))]
    body = rows[1:] if names is header else rows
    for number, row in enumerate(body):
        if len(row) != len(names):
            raise UserError(
                f"{place}: row {number} of {file} has {len(row)} fields, not {len(names)}; "
                "repair the file"
            )
    return [dict(zip(names, row, strict=True)) for row in body]


def _list_candidates(config: EvaluationSetConfig) -> list[tuple[str, ...]]:
    """Sets of columns that would do, best first."""
    if config.columns:
        return [config.columns]
    layouts = find_layouts(config.task)
    return [columns for layout in layouts if (columns := layout.choose(config.texts))]


def _choose_columns(
    row: Row, config: EvaluationSetConfig, file: Path, place: str
) -> tuple[str, ...]:
    """The first candidate whose columns the row has."""
    candidates = _list_candidates(config)
    if not candidates:
        raise UserError(f"{place}.texts={config.texts}: {config.task} has only questions")
    for columns in candidates:
        if all(has_column(row, column) for column in columns):
            return columns
    missing = next(column for column in candidates[0] if not has_column(row, column))
    names = ", ".join(" ".join(name.split())[:_NAME_CHARS] for name in row)
    remedy = "its names, or 0, 1, ... when it has no header" if ".csv" in file.name else "its names"
    raise UserError(
        f"{place}: {file} has no column {missing!r}{_suggest(missing, row)}; it has {names}; "
        f"give {place}.columns {remedy}"
    )


def _list_row(row: Row, column: str, file: Path, number: int, place: str) -> list[str]:
    try:
        return list(list_texts(row, column))
    except KeyError as error:
        raise UserError(
            f"{place}: row {number} of {file} has no {error.args[0]!r} of column {column!r}; "
            "repair the file"
        ) from None
    except TypeError as error:
        raise UserError(
            f"{place}: column {column!r} of {file} holds no texts in row {number} "
            f"but {error}; give {place}.columns"
        ) from None


def _suggest(name: str, known: Iterable[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
