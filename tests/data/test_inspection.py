from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.config import PrepareConfig, SourceConfig, TextbookConfig
from raylign.data.inspection import SourceReport, inspect, recognise, render


def look(**keys: Any) -> SourceReport:
    (report,) = inspect(PrepareConfig(sources=(SourceConfig(**keys),)))
    return report


def lines(file: Path, *records: Any) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_a_good_source(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"text": f"words {n}", "n": n} for n in range(900)))
    report = look(kind="jsonl", path=path)
    assert (report.files, report.size, report.content) == (1, path.stat().st_size, "jsonl")
    assert report.schema == {"text": "string", "n": "number"}
    assert report.columns == {"text": "text"}
    assert report.records == 300 and not report.reasons
    assert report.samples[0] == ("a:a.jsonl@0", "words 0")
    assert not report.warnings and report.error is None


def test_bad_records_are_shown_with_their_place(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "one"}, {"body": "x"}, [1], {"text": "two"})
    report = look(kind="jsonl", path=file)
    assert report.reasons == {"no_column": 1, "not_an_object": 1}
    assert [(bad.reason, bad.offset) for bad in report.rejected] == [
        ("no_column", 16),
        ("not_an_object", 30),
    ]
    assert "2 of 4 records cannot be read" in report.warnings[0]
    text = render([report])
    assert "a:a.jsonl@16 (offset 16): no_column" in text and "2 usable, 2 damaged" in text


def test_mistakes_are_reported_for_every_source(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "b.parquet")
    sources = (
        SourceConfig(kind="jsonl", path=tmp_path / "none"),
        SourceConfig(kind="parquet", path=tmp_path / "b.parquet", text_column="bodi"),
        SourceConfig(kind="textbook"),
    )
    config = PrepareConfig(sources=sources, textbook=TextbookConfig(pages=20))
    first, second, third = inspect(config)
    assert first.error and "no such file" in first.error
    assert second.error and "did you mean 'body'?" in second.error
    assert second.schema == {"body": "string"}
    assert third.error is None and third.records == 20
    assert render([first, second, third]).count("ERROR prepare.sources.") == 2


@pytest.mark.parametrize(
    ("name", "data", "content"),
    [
        ("a.jsonl", b'{"text": 1}\n', "jsonl"),
        ("a.json", b'[\n  {"text": 1}]', "a JSON array"),
        ("a.txt", b"Once upon a time", "text"),
        ("a.bin", b"\0\1\2", "binary"),
        ("a.arc", b"filedesc://x 0 0 text/plain 0\n", "arc"),
        ("a.warc.gz", gzip.compress(b"WARC/1.0\r\nWARC-Type: response\r\n", mtime=0), "warc"),
        (
            "a.wet.gz",
            gzip.compress(b"WARC/1.0\r\n\r\n\r\n", mtime=0)
            + gzip.compress(b"WARC/1.0\r\nWARC-Type: conversion\r\n", mtime=0),
            "wet",
        ),
        ("a.gz", b"\x1f\x8bno", "binary"),
    ],
)
def test_contents_are_recognised(tmp_path: Path, name: str, data: bytes, content: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert recognise(str(tmp_path / name)) == content


def test_a_kind_that_does_not_fit_is_warned_of(tmp_path: Path) -> None:
    report = look(kind="text", path=lines(tmp_path / "a.jsonl", {"text": "x"}))
    assert "looks like jsonl; correct prepare.sources.0.kind" in report.warnings[0]
    (tmp_path / "b.json").write_text('[{"text": "x"}]')
    report = look(kind="jsonl", path=tmp_path / "b.json")
    assert "looks like a JSON array" in report.warnings[0]
    (tmp_path / "c.txt").write_text("")
    assert look(kind="text", path=tmp_path / "c.txt").warnings == ["every file is empty"]
