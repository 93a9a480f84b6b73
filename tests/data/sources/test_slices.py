from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from raylign.config import SourceConfig, TextbookConfig, UserError
from raylign.data.extraction.text import clean_text
from raylign.data.sources import gathering
from raylign.data.sources.python import list_modules
from raylign.data.sources.slices import plan_slices, read_slice
from raylign.data.textbook.arithmetic import write_textbook

TEXTBOOK = TextbookConfig(pages=2500)


def read(*configs: SourceConfig, textbook: TextbookConfig = TEXTBOOK, seed: int = 0) -> list[dict]:
    """All rows of all slices, in order."""
    rows = []
    for part in plan_slices(configs, textbook):
        for table in read_slice(part, textbook, seed):
            rows += table.to_pylist()
    return rows


def write_lines(file: Path, lines: list[bytes]) -> Path:
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def real_data(name: str) -> Path:
    """A file of real public data; the test is skipped where there is none."""
    root = Path(__file__).resolve().parents[3]
    base = Path(os.environ.get("RAYLIGN_TEST_DATA", root.parent / "shared" / "data"))
    if not (base / name).exists():
        pytest.skip(f"no real data at {base / name}; set RAYLIGN_TEST_DATA")
    return base / name


def test_textbook_slices_are_the_textbook() -> None:
    rows = read(SourceConfig(kind="textbook"), seed=4)
    assert [row["text"] for row in rows] == [
        clean_text(page) for page in write_textbook(2500, 4, 3, 0.85)
    ]
    assert len(plan_slices([SourceConfig(kind="textbook")], TEXTBOOK)) == 3
    assert rows[1234]["origin"] == "textbook:page 1234"


def test_pydoc_is_read_whole_and_by_section() -> None:
    from pydoc_data.topics import topics

    rows = read(SourceConfig(kind="pydoc"))
    by_topic: dict[str, str] = {}
    for row in rows:
        name = row["origin"].removeprefix("pydoc:")
        by_topic[name] = by_topic.get(name, "") + "\n" + row["text"]
    assert {name: text.split() for name, text in by_topic.items()} == {
        name: text.split() for name, text in topics.items()
    }
    assert max(len(row["text"]) for row in rows) < 8000


def test_docstrings_are_named_after_their_place() -> None:
    rows = read(SourceConfig(kind="docstrings"))
    by_origin = {row["origin"]: row["text"] for row in rows}
    assert by_origin["docstrings:json/decoder.py"].startswith("json.decoder\n\nImplementation of")
    assert "json.decoder.JSONDecoder.raw_decode\n\nDecode a JSON document" in "".join(
        text for origin, text in by_origin.items() if "json/decoder" in origin
    )
    assert len({row["doc_id"] for row in rows}) == len(rows) > 500
    assert not any(row["reason"] for row in rows)
    assert not any(
        "/test/" in str(module) or "site-packages" in str(module) for module in list_modules()
    )


def test_definitions_inside_conditions_are_found(tmp_path: Path) -> None:
    import ast

    from raylign.data.sources.python import _group

    code = (
        '"""Top."""\ntry:\n    def f():\n        """F."""\nexcept ImportError:\n'
        '    class C:\n        """C."""\n        async def g(self):\n            """G."""\n'
    )
    (row,) = _group("pkg/__init__.py", ast.parse(code))
    assert row.text == "pkg\n\nTop.\n\n\npkg.f\n\nF.\n\n\npkg.C\n\nC.\n\n\npkg.C.g\n\nG."
    assert row.origin == "pkg/__init__.py"


JSON_LINES = [
    b'{"text": "good \xc3\xa9"}',
    b"",
    b'{"text": "cut',
    b'{"body": "other column"}',
    b'{"text": 5}',
    b'{"text": null}',
    b"[1, 2]",
    b'{"text": "half \\ud83d"}',
    b'{"text": "\xff"}',
    b"[" * 100_000,
    b'{"text": "last", "more": [1]}',
]
JSON_REASONS = [
    None,
    "invalid_json",
    "no_column",
    "not_text",
    "not_text",
    "not_an_object",
    "invalid_unicode",
    "invalid_utf8",
    "invalid_json",
    None,
]


def test_malformed_json_lines_are_rejected_with_a_reason(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", JSON_LINES)
    rows = read(SourceConfig(kind="jsonl", path=file))
    assert [row["reason"] for row in rows] == JSON_REASONS
    assert [row["text"] for row in rows if not row["reason"]] == ["good é", "last"]
    assert rows[1]["text"] == '{"text": "cut\n'
    place = file.read_bytes().index(JSON_LINES[-1])
    assert rows[-1]["origin"] == f"rows:rows.jsonl@{place}"
    assert max(len(row["text"]) for row in rows) <= 2000


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 50, 1000])
def test_rows_do_not_depend_on_where_files_are_cut(tmp_path: Path, size: int) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [*JSON_LINES[:9], JSON_LINES[10]])
    whole = read(SourceConfig(kind="jsonl", path=file))
    parts = read(SourceConfig(kind="jsonl", path=file, part_bytes=size))
    assert [(r["doc_id"], r["text"]) for r in parts] == [(r["doc_id"], r["text"]) for r in whole]


def test_last_line_needs_no_newline(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b"}')
    assert [r["text"] for r in read(SourceConfig(kind="jsonl", path=tmp_path))] == ["a", "b"]


def test_gzip_and_what_is_left_of_a_broken_one(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"body": f"row {i} " * 50}).encode() + b"\n" for i in range(4000))
    packed = gzip.compress(lines, mtime=0)
    (tmp_path / "good.jsonl.gz").write_bytes(packed)
    config = SourceConfig(kind="jsonl", path=tmp_path, text_column="body")
    rows = read(config)
    assert len(rows) == 4000 and not any(row["reason"] for row in rows)
    (tmp_path / "good.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    rows = read(config)
    assert 1 < len(rows) < 4000
    assert [row["reason"] for row in rows[-1:]] == ["damaged_compression"]
    assert not any(row["reason"] for row in rows[:-1])


def test_parquet_by_row_group(tmp_path: Path) -> None:
    texts = [None if i == 13 else f"text {i}" for i in range(50)]
    pq.write_table(
        pa.table({"content": texts, "n": range(50)}), tmp_path / "a.parquet", row_group_size=7
    )
    config = SourceConfig(kind="parquet", path=tmp_path, text_column="content")
    whole = read(config)
    assert [row["text"] for row in whole if not row["reason"]] == [t for t in texts if t]
    assert whole[13]["reason"] == "not_text"
    config = config.model_copy(update={"part_bytes": 1})
    assert len(plan_slices([config], TEXTBOOK)) == 8
    assert [row["doc_id"] for row in read(config)] == [row["doc_id"] for row in whole]


def test_damaged_parquet_pages_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pa.table({"text": [f"text {i} " * 40 for i in range(2000)]})
    pq.write_table(table, file, row_group_size=500, compression="zstd", use_dictionary=False)
    body = bytearray(file.read_bytes())
    body[len(body) // 2 : len(body) // 2 + 400] = b"\0" * 400
    file.write_bytes(bytes(body))
    rows = read(SourceConfig(kind="parquet", path=file))
    bad = [row for row in rows if row["reason"]]
    assert bad and all(row["reason"] == "damaged_row_group" for row in bad)
    assert len(rows) - len(bad) >= 1000 and len(rows) == 2000  # what is lost is counted


def test_plain_text_by_paragraphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paragraphs = [f"Paragraph {i}. " + "words and more words " * 30 for i in range(40)]
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(paragraphs))
    rows = read(SourceConfig(kind="text", path=file))
    assert " ".join(row["text"] for row in rows).split() == file.read_text().split()
    assert all(row["text"].startswith("Paragraph") for row in rows)
    assert all(2000 <= len(row["text"]) < 8000 for row in rows[:-1])
    file.write_bytes(b"fine\n\n" + b"x" * 2500 + b"\n\nbad \xff byte\n")
    assert [row["reason"] for row in read(SourceConfig(kind="text", path=file))] == [
        None,
        "invalid_utf8",
    ]
    file.write_text(" \n\n \n")
    assert read(SourceConfig(kind="text", path=file)) == []
    file.write_text("")
    assert read(SourceConfig(kind="text", path=file)) == []


def test_ids_are_stable_and_do_not_depend_on_the_folder(tmp_path: Path) -> None:
    ids = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        file = write_lines(tmp_path / folder / "rows.jsonl", [b'{"text": "a"}', b'{"text": "b"}'])
        ids.append([row["doc_id"] for row in read(SourceConfig(kind="jsonl", path=file))])
    places = (b"rows\x00rows.jsonl\x000", b"rows\x00rows.jsonl\x0014")  # source, file, first byte
    assert ids[0] == ids[1] == [xxhash.xxh3_128_hexdigest(place) for place in places]
    both = read(
        SourceConfig(kind="jsonl", path=tmp_path / "one" / "rows.jsonl"),
        SourceConfig(kind="jsonl", path=tmp_path / "two" / "rows.jsonl"),
    )
    assert len({row["doc_id"] for row in both}) == 4  # of one name, so known by their paths


@pytest.mark.parametrize("limit", [1, 3, 5])
def test_limit_stops_a_slice_early(tmp_path: Path, limit: int) -> None:
    lines = [b'{"text": "a"}', b"bad", b'{"text": "b"}', b'{"text": "c"}', b'{"text": "d"}']
    file = write_lines(tmp_path / "rows.jsonl", lines)
    rows = read(SourceConfig(kind="jsonl", path=file, limit=limit))
    assert sum(not row["reason"] for row in rows) == min(limit, 4)
    assert len(read(SourceConfig(kind="textbook", limit=limit))) == limit


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "BATCH_CHARS", 5000)
    (part, *_) = plan_slices([SourceConfig(kind="textbook")], TEXTBOOK)
    tables = list(read_slice(part, TEXTBOOK, 0))
    assert all(sum(map(len, t["text"].to_pylist())) <= 5000 for t in tables)
    assert sum(t.num_rows for t in tables) == 1000
    offsets = [p for t in tables for p in t["offset"].to_pylist()]
    assert offsets == list(range(1000))


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda d: {"kind": "jsonl", "path": d / "none"},
            r"prepare\.sources\.0\.path=.*none: no such",
        ),
        (lambda d: {"kind": "jsonl", "path": d}, r"holds no \.jsonl .* file; correct path or kind"),
        (lambda d: {"kind": "jsonl"}, r"prepare\.sources\.0: kind=jsonl needs a path"),
        (lambda d: {"kind": "pydoc", "path": d}, r"kind=pydoc takes no path"),
        (
            lambda d: {"kind": "parquet", "path": write_lines(d / "x.parquet", [b"no"])},
            r"not a readable Parquet file",
        ),
        (
            lambda d: {"kind": "parquet", "path": parquet(d / "x.parquet", texts=["a"])},
            r"text_column=text: .* did you mean 'texts'\?",
        ),
        (
            lambda d: {"kind": "parquet", "path": parquet(d / "x.parquet", text=[1])},
            r"text_column=text: holds int64",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan_slices([SourceConfig(**make(tmp_path))], TEXTBOOK)
    assert "\n" not in str(caught.value)


def test_listing_a_source_twice_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"prepare\.sources\.1: pydoc is listed twice"):
        plan_slices([SourceConfig(kind="pydoc"), SourceConfig(kind="pydoc", limit=3)], TEXTBOOK)


def test_real_files() -> None:
    c4 = read(SourceConfig(kind="jsonl", path=real_data("web/c4_demo.jsonl")))
    assert len(c4) == 300 and not any(row["reason"] for row in c4)
    humaneval = read(
        SourceConfig(
            kind="jsonl", path=real_data("humaneval/HumanEval.jsonl.gz"), text_column="prompt"
        )
    )
    assert len(humaneval) == 164
    wiki = real_data("web/wiki_demo.txt")
    texts = [row["text"] for row in read(SourceConfig(kind="text", path=wiki))]
    assert " ".join(texts).split() == clean_text(wiki.read_text()).split()
