"""A look at the sources of a recipe before anything is computed: what is there, what is chosen,
and the first records that cannot be used. Reads a few hundred records, and needs no cluster.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow.parquet as pq

from raylign.config import PrepareConfig, SourceConfig, UserError
from raylign.data.sources.columns import choose_columns
from raylign.data.sources.cuts import Slice
from raylign.data.sources.files import KINDS
from raylign.data.sources.lines import open_plain
from raylign.data.sources.rows import DAMAGED
from raylign.data.sources.slices import label_sources, plan_source, read_slice
from raylign.data.sources.storage import list_stored, open_arrow, open_stored

RECORDS = 300
SLICES = 8
SAMPLES = 3
REJECTED = 5
EXCERPT_CHARS = 160
HEAD_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that cannot be used."""

    origin: str
    offset: int
    reason: str
    excerpt: str


@dataclass(slots=True)
class SourceReport:
    """What is known of one source."""

    key: str
    """`prepare.sources.2`"""
    label: str
    kind: str
    path: str
    files: int = 0
    size: int = 0
    """Bytes as stored."""
    slices: int = 0
    content: str = ""
    """What the first file looks like, or "" where there is none."""
    schema: dict[str, str] = field(default_factory=dict)
    """Column to type."""
    columns: dict[str, str] = field(default_factory=dict)
    """Role to the column that is chosen for it."""
    records: int = 0
    """Records that were looked at."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why records were rejected, and how many."""
    samples: list[tuple[str, str]] = field(default_factory=list)
    """(origin, excerpt) of usable documents."""
    rejected: list[Rejected] = field(default_factory=list)
    """The first of every reason comes first."""
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    """Why the source cannot be used at all; one line."""

    @property
    def damaged(self) -> int:
        """Records that could not be read as what they ought to be."""
        return sum(count for reason, count in self.reasons.items() if reason in DAMAGED)


def inspect(config: PrepareConfig, seed: int = 0) -> list[SourceReport]:
    """A report for every source, in order; what is wrong with one is in its report."""
    labels = label_sources(config.sources)
    return [
        _inspect_source(source, label, f"prepare.sources.{number}", config, seed)
        for number, (source, label) in enumerate(zip(config.sources, labels, strict=True))
    ]


def _inspect_source(
    source: SourceConfig, label: str, key: str, config: PrepareConfig, seed: int
) -> SourceReport:
    report = SourceReport(key, label, source.kind, str(source.path or ""))
    try:
        if source.kind in KINDS:
            _look_at_files(source, report)
        if source.kind in ("jsonl", "parquet", "huggingface"):
            report.columns = _name_columns(source, report.schema)
        slices = plan_source(source, label, config.textbook, key)
        report.slices = len(slices)
        _read_some(slices, report, config, seed)
    except UserError as error:
        report.error = str(error)
    except OSError as error:
        report.error = f"{key}: {error}"
    if report.records and report.damaged > config.max_damaged_share * report.records:
        report.warnings.append(
            f"{report.damaged} of {report.records} records cannot be read, more than "
            f"prepare.max_damaged_share={config.max_damaged_share} allows"
        )
    if report.slices and not report.samples and report.records:
        report.warnings.append(f"none of the first {report.records} records is a document")
    return report


def _name_columns(source: SourceConfig, schema: dict[str, str]) -> dict[str, str]:
    """Role to column; what a preset knows and the files lack is not used."""
    chosen = choose_columns(source)
    present = [
        name
        for name in chosen.names()
        if not schema or name in schema or name.partition(".")[0] in schema
    ]
    roles = ("text", "id", "url", "date", "domain")
    found = {role: getattr(chosen, role) for role in roles if getattr(chosen, role) in present}
    kept = [name for name in chosen.meta if name in present]
    return found | ({"meta": ", ".join(kept)} if kept else {})


def _look_at_files(source: SourceConfig, report: SourceReport) -> None:
    assert source.path is not None
    stored = list_stored(source.path, KINDS[source.kind], report.key)
    report.files, report.size = len(stored), sum(file.size for file in stored)
    first = next((file for file in stored if file.size), None)
    if first is None:
        report.warnings.append("every file is empty")
        return
    report.content = recognise(first.path)
    expected = {"warc": ("warc", "arc")}.get(source.kind, (source.kind,))
    if report.content not in (*expected, "text"):
        report.warnings.append(
            f"kind={source.kind}, but {first.name} looks like {report.content}; correct "
            f"{report.key}.kind"
        )
    elif report.content == "text" and source.kind != "text":
        report.warnings.append(f"{first.name} does not look like {source.kind}")
    if report.content == "jsonl":
        report.schema = _describe_lines(first.path)
    elif report.content == "parquet":
        with open_arrow(first.path) as stream:
            schema = pq.ParquetFile(stream).schema_arrow
        report.schema = {field.name: str(field.type) for field in schema}


def recognise(path: str) -> str:
    """What a file holds, by its first bytes: a kind, `arc`, `a JSON array` or `binary`."""
    head = _read_head(path)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"WARC/"):
        return "wet" if b"\nWARC-Type: conversion" in head else "warc"
    if head.startswith(b"filedesc://"):
        return "arc"
    body = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if body.startswith(b"{"):
        return "jsonl"
    if body.startswith(b"[") and body[1:].lstrip()[:1] in (b"{", b"[", b'"'):
        return "a JSON array"
    return "binary" if b"\0" in head or head.startswith(b"\x1f\x8b") else "text"


def _read_head(path: str) -> bytes:
    """The first bytes, unpacked; of a file of gzip members, the first few members together."""
    with open_stored(path) as stream:
        raw = stream.read(HEAD_BYTES)
    if raw.startswith(b"\x1f\x8b"):
        plain, rest = b"", raw
        while rest.startswith(b"\x1f\x8b") and len(plain) < HEAD_BYTES:
            unpack = zlib.decompressobj(31)
            try:
                plain += unpack.decompress(rest, HEAD_BYTES)
            except zlib.error:
                break
            rest = unpack.unused_data
        return plain or raw
    if path.endswith((".zst", ".lz4", ".bz2")):
        try:
            with open_plain(path) as stream:
                return stream.read(HEAD_BYTES)
        except OSError:
            return raw
    return raw


def _describe_lines(path: str) -> dict[str, str]:
    """Column to the JSON types among the first lines."""
    names = {str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
    found: dict[str, dict[str, None]] = {}
    try:
        with open_plain(path) as stream:
            for line in islice(iter(lambda: stream.readline(16 << 20), b""), 100):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                for name, value in record.items() if isinstance(record, dict) else ():
                    kind = names.get(type(value), "list" if isinstance(value, list) else "object")
                    found.setdefault(name, {})[kind] = None
    except (OSError, EOFError, zlib.error):
        pass  # the first bad record says so
    return {name: " or ".join(kinds) for name, kinds in found.items()}


def _read_some(
    slices: Sequence[Slice], report: SourceReport, config: PrepareConfig, seed: int
) -> None:
    """Records of the first slice, the last, and some between."""
    steps = max(1, min(SLICES, len(slices)) - 1)
    chosen = sorted({number * (len(slices) - 1) // steps for number in range(steps + 1)})
    chosen = chosen if slices else []
    reasons: Counter[str] = Counter()
    later: list[Rejected] = []
    for number in chosen:
        taken = 0
        for row in _iterate(slices[number], config, seed, RECORDS // len(chosen)):
            taken += 1
            excerpt = shorten(row["text"])
            if row["reason"] is None:
                if len(report.samples) < SAMPLES:
                    report.samples.append((row["origin"], excerpt))
                continue
            bad = Rejected(row["origin"], row["offset"], row["reason"], excerpt)
            (later if reasons[bad.reason] else report.rejected).append(bad)
            reasons[bad.reason] += 1
        report.records += taken
    report.rejected = (report.rejected + later)[: max(REJECTED, len(report.rejected))]
    report.reasons = dict(sorted(reasons.items()))


def _iterate(part: Slice, config: PrepareConfig, seed: int, most: int) -> Iterator[dict[str, Any]]:
    columns = ["origin", "offset", "reason", "text"]
    left = most
    for table in read_slice(part, config.textbook, seed):
        yield from table.slice(0, left).select(columns).to_pylist()
        left -= table.num_rows
        if left <= 0:
            return


def shorten(text: str) -> str:
    """One line of at most `EXCERPT_CHARS` characters."""
    line = " ".join(text[: 4 * EXCERPT_CHARS].split())
    return line if len(line) <= EXCERPT_CHARS else line[: EXCERPT_CHARS - 1] + "…"


def render(reports: Sequence[SourceReport]) -> str:
    """Plain text for a terminal."""
    return "\n\n".join("\n".join(_render(report)) for report in reports) + "\n"


def _render(report: SourceReport) -> Iterator[str]:
    where = f" {report.path}" if report.path else ""
    yield f"{report.key}  {report.label}: {report.kind}{where}"
    if report.files:
        content = f", looks like {report.content}" if report.content else ""
        yield f"  {_count(report.files, 'file')}, {_bytes(report.size)}{content}"
    if report.error:
        yield f"  ERROR {report.error}"
    for warning in report.warnings:
        yield f"  WARNING {warning}"
    if report.schema:
        yield "  columns  " + ", ".join(f"{name}: {kind}" for name, kind in report.schema.items())
    if report.columns:
        yield "  used     " + ", ".join(f"{r} = {name}" for r, name in report.columns.items())
    if report.records:
        usable = report.records - sum(report.reasons.values())
        yield (
            f"  looked at {_count(report.records, 'record')} of {_count(report.slices, 'slice')}: "
            f"{usable} usable, {report.damaged} damaged, "
            f"{report.records - usable - report.damaged} not documents"
        )
    for reason, count in sorted(report.reasons.items(), key=lambda item: (-item[1], item[0])):
        yield f"    {count:>5}  {reason}{' (damaged)' if reason in DAMAGED else ''}"
    for bad in report.rejected:
        yield f"  bad   {bad.origin} (offset {bad.offset}): {bad.reason}: {bad.excerpt!r}"
    for origin, excerpt in report.samples:
        yield f"  good  {origin}: {excerpt!r}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(number: int) -> str:
    size = float(number)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
