from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.config import SourceConfig, TextbookConfig, UserError
from raylign.data.sources.rows import date_text, meta_text
from raylign.data.sources.slices import plan_slices, read_slice

RECORDS: list[dict[str, Any]] = [
    {
        "text": f"document {n}",
        "meta": {"pile_set_name": "Books3" if n % 2 else "PubMed"},
        "url": f"http://a.org/{n}",
        "when": "2024-01-02",
        "score": n / 4,
        "tags": ["x", "y"],
    }
    for n in range(6)
]


def write(directory: Path, kind: str, records: list[dict[str, Any]]) -> Path:
    file = directory / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), file)
    else:
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def read(**keys: Any) -> list[dict[str, Any]]:
    return [
        row
        for part in plan_slices([SourceConfig(**keys)], TextbookConfig())
        for table in read_slice(part, TextbookConfig(), 0)
        for row in table.to_pylist()
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_column_finds_its_place(tmp_path: Path, kind: Any) -> None:
    rows = read(
        kind=kind,
        path=write(tmp_path, kind, RECORDS),
        domain_column="meta.pile_set_name",
        url_column="url",
        date_column="when",
        meta_columns=("tags", "score"),
    )
    assert [row["domain"] for row in rows] == ["PubMed", "Books3"] * 3
    assert rows[3]["url"] == "http://a.org/3" and rows[3]["date"] == "2024-01-02"
    assert rows[3]["meta"] == '{"score": 0.75, "tags": ["x", "y"]}'


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_presets_know_columns_and_recipes_overrule_them(tmp_path: Path, kind: Any) -> None:
    path = write(tmp_path, kind, RECORDS)
    assert {row["domain"] for row in read(kind=kind, path=path, preset="the_pile")} == {
        "PubMed",
        "Books3",
    }
    rows = read(kind=kind, path=path, preset="fineweb_edu", text_column="when", domain="web")
    assert rows[1]["text"] == "2024-01-02" and rows[1]["url"] == "http://a.org/1"
    assert rows[1]["meta"] == '{"score": 0.25}' and rows[1]["domain"] == "web"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"text_column": "txt"}, r"text_column=txt: .* did you mean 'text'\?"),
        ({"url_column": "link"}, r"url_column=link: .* it has text, meta"),
        ({"meta_columns": ("score", "tag")}, r"meta_columns=tag: .* did you mean 'tags'\?"),
        ({"preset": "the_stack"}, r"text_column=content: "),
    ],
)
def test_missing_columns_are_named(
    tmp_path: Path, kind: Any, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=r"^prepare\.sources\.0\." + message):
        read(kind=kind, path=write(tmp_path, kind, RECORDS), **keys)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_cells_of_html(tmp_path: Path, kind: Any) -> None:
    cells = ["<html><body><p>" + "A long story of the river. " * 20 + "</p></body></html>", "<p>"]
    rows = read(
        kind=kind, path=write(tmp_path, kind, [{"text": cell} for cell in cells]), html=True
    )
    assert rows[0]["text"] == ("A long story of the river. " * 20).strip()
    assert rows[1]["reason"] == "no_main_text"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_cleaning_leaves_nothing_of_is_empty(tmp_path: Path, kind: Any) -> None:
    texts = [" \n\u200b", "", "good", "\ufeff", "a\r\nb  \n"]
    rows = read(kind=kind, path=write(tmp_path, kind, [{"text": text} for text in texts]))
    assert [row["reason"] for row in rows] == ["empty", "empty", None, "empty", None]
    assert rows[4]["text"] == "a\nb"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_large_records_are_rejected(tmp_path: Path, kind: Any) -> None:
    texts = ["short", "é" * 2_000_000, "short too"]
    path = write(tmp_path, kind, [{"text": text} for text in texts])
    rows = read(kind=kind, path=path, max_record_bytes=1_000_000)
    assert [row["reason"] for row in rows] == [None, "too_large", None]
    assert 0 < len(rows[1]["text"]) <= 2000
    assert [row["reason"] for row in read(kind=kind, path=path)] == [None, None, None]


def test_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    good, bad = [b"one", b"two"], [b"three", b"\xff\xfe", b"four"]
    cells = pa.array(good + bad, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": cells, "n": range(5)}), tmp_path / "a.parquet")
    rows = read(kind="parquet", path=tmp_path, meta_columns=("n",))
    assert [row["reason"] for row in rows] == [None, None, None, "invalid_utf8", None]
    assert [row["meta"] for row in rows][:3] == ['{"n": 0}', '{"n": 1}', '{"n": 2}']
    assert [row["offset"] for row in rows] == list(range(5))


def test_parquet_types_of_text(tmp_path: Path) -> None:
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"text": pa.array(["a", None, "b", "a"], pa.string()).cast(kind)})
        pq.write_table(table, tmp_path / "a.parquet")
        rows = read(kind="parquet", path=tmp_path)
        assert [row["text"] for row in rows] == ["a", "", "b", "a"]
        assert [row["reason"] for row in rows] == [None, "not_text", None, None]


@pytest.mark.parametrize(
    ("value", "date"),
    [
        ("2024-05-06T07:08:09Z", "2024-05-06T07:08:09Z"),
        ("2024-05-06", "2024-05-06"),
        (0, "1970-01-01T00:00:00+00:00"),
        (1_700_000_000, "2023-11-14T22:13:20+00:00"),
        (1_700_000_000_000, "2023-11-14T22:13:20+00:00"),
        ("yesterday", None),
        ("2024-99-99", None),
        (True, None),
        (None, None),
        (1e300, None),
    ],
)
def test_dates(value: object, date: str | None) -> None:
    assert date_text(value) == date


def test_meta_is_sorted_and_without_nulls() -> None:
    assert meta_text({"b": 1, "a": "é", "c": None}) == '{"a": "\\u00e9", "b": 1}'
    assert meta_text({"c": None}) is None
