"""Where documents come from: sources are cut into slices, and every slice is read on its own.

A slice is a plain row of numbers and strings, decided by the recipe and the data alone. So any
worker can read any slice, the same slices come out on one core and on a thousand, and a document's
identity (hash of source, path and offset) never depends on who read it or when.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from raylign.config import SourceConfig, TextbookConfig, UserError
from raylign.data.sources import files as source_files
from raylign.data.sources import hub
from raylign.data.sources import python as source_python
from raylign.data.sources.columns import choose_columns
from raylign.data.sources.cuts import Cut, Slice
from raylign.data.sources.gathering import gather
from raylign.data.sources.rows import Row
from raylign.data.sources.storage import is_url
from raylign.data.textbook.arithmetic import write_page

__all__ = ["Slice", "label_sources", "plan_slices", "plan_source", "read_rows", "read_slice"]

TEXTBOOK = "textbook"
BUILT_IN = ("pydoc", "docstrings", TEXTBOOK)
PAGES_A_SLICE = 1000
MODULES_A_SLICE = 48


def plan_slices(sources: Sequence[SourceConfig], textbook: TextbookConfig) -> list[Slice]:
    """Cut all sources. Raises `UserError` for a path that is missing or cannot be used."""
    slices: list[Slice] = []
    for number, (source, label) in enumerate(zip(sources, label_sources(sources), strict=True)):
        slices += plan_source(source, label, textbook, f"prepare.sources.{number}", len(slices))
    return slices


def plan_source(
    source: SourceConfig, label: str, textbook: TextbookConfig, key: str, first: int = 0
) -> list[Slice]:
    """Cut one source; `key` is its place in the recipe, for messages, and `first` the index of its
    first slice. Raises `UserError`."""
    columns = choose_columns(source)
    return [
        Slice(
            index=first + number,
            kind=source.kind,
            source=label,
            domain=source.domain or label,
            path=cut.path,
            name=cut.name,
            start=cut.start,
            stop=cut.stop,
            identity=cut.identity,
            text_column=columns.text,
            id_column=columns.id,
            url_column=columns.url,
            date_column=columns.date,
            domain_column=columns.domain,
            meta_columns=columns.meta,
            html=source.html,
            extractor=source.extractor,
            max_record_bytes=source.max_record_bytes,
            limit=source.limit or 0,
            options=cut.options,
        )
        for number, cut in enumerate(cut_source(source, textbook, key))
    ]


def label_sources(sources: Sequence[SourceConfig]) -> list[str]:
    """A name for each source: its kind when built in, else its file's or directory's name.

    Raises `UserError` for a kind without a path that needs one, and for a source listed twice.
    """
    for number, source in enumerate(sources):
        key = f"prepare.sources.{number}"
        given = str(source.path or "").strip()  # "" would be the working directory
        if (source.kind in BUILT_IN) == bool(given):
            verb = "takes no path" if given else "needs a path"
            raise UserError(f"{key}: kind={source.kind} {verb}; give `kind` and `path` that agree")
        if any(_place(source) == _place(other) for other in sources[:number]):
            raise UserError(f"{key}: {source.path or source.kind} is listed twice; remove one")
    names = [_name(source) for source in sources]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    labels = [
        str(s.path) if s.path and (name in repeated or not name) else name
        for s, name in zip(sources, names, strict=True)
    ]
    counts = Counter(labels)
    return [
        f"{label} ({s.name or s.kind}, {s.split})" if counts[label] > 1 else label
        for s, label in zip(sources, labels, strict=True)
    ]


def _place(source: SourceConfig) -> tuple[str | None, ...]:
    path = None if source.path is None else str(source.path)
    if path is not None and not is_url(path) and Path(path).exists():
        path = str(Path(path).resolve())  # by whatever way it is reached
    if source.kind == "huggingface":
        return source.kind, path, source.name, source.split, source.revision
    return source.kind, path


def _name(source: SourceConfig) -> str:
    """The last part of a path that is not a pattern, up to its first dot."""
    if source.path is None:
        return source.kind
    text = str(source.path)
    if "://" not in text and not any(mark in text for mark in "*?["):
        return Path(text).resolve().name.split(".")[0]
    parts = text.partition("?")[0] if "://" in text else text
    plain = [p for p in parts.split("/") if p and not any(mark in p for mark in "*?[")]
    return plain[-1].split(".")[0] if plain and not plain[-1].endswith(":") else ""


def cut_source(source: SourceConfig, textbook: TextbookConfig, key: str) -> Iterator[Cut]:
    """All parts of one source; `key` is its place in the recipe, for messages."""
    if source.kind == TEXTBOOK:
        yield from _ranges(min(textbook.pages, source.limit or textbook.pages), PAGES_A_SLICE)
    elif source.kind == "docstrings":
        yield from _ranges(len(source_python.list_modules()), MODULES_A_SLICE)
    elif source.kind == "pydoc":
        yield from _ranges(1, 1)
    elif source.kind == "huggingface":
        yield from hub.cut(source, key)
    else:
        yield from source_files.cut(source, key)


def _ranges(total: int, size: int) -> Iterator[Cut]:
    for start in range(0, total, size):
        yield Cut("", "", start, min(start + size, total))


def read_slice(part: Slice, textbook: TextbookConfig, seed: int) -> Iterator[pa.Table]:
    """The slice's records as tables of `gathering.FOUND`, rejected ones included.

    Texts are extracted, repaired and clean. Tables hold at most `gathering.BATCH_DOCUMENTS` rows
    and, but for one larger document, `gathering.BATCH_CHARS` characters: memory does not grow with
    the slice.
    """
    return gather(read_rows(part, textbook, seed), part)


def read_rows(part: Slice, textbook: TextbookConfig, seed: int) -> Iterable[Row | pa.Table]:
    """What the reader of the slice's kind finds, as it stands there."""
    if part.kind == TEXTBOOK:
        return _read_textbook(part, textbook, seed)
    if part.kind == "docstrings":
        return source_python.read_docstrings(part.start, part.stop)
    if part.kind == "pydoc":
        return source_python.read_topics()
    if part.kind == "huggingface":
        return hub.read(part)
    return source_files.read(part)


def _read_textbook(part: Slice, textbook: TextbookConfig, seed: int) -> Iterator[Row]:
    for number in range(part.start, part.stop):
        rng = random.Random(f"textbook/{seed}/{number}")  # as in `write_textbook`
        page = write_page(rng, textbook.max_digits, textbook.worked_share)
        yield Row(f"page {number}", number, page)
