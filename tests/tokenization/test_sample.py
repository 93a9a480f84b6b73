from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raylign.data.documents import read_batches, shuffle_key
from raylign.tokenization.sample import Excerpt, draw_sample


def sample_texts(files: list[Path], count: int, seed: int) -> list[str]:
    """At most `count` texts, chosen and ordered by `shuffle_key`."""
    chosen: list[tuple[int, str, str]] = []
    for file in files:
        for table in read_batches(file, ["doc_id", "text"]):
            ids, texts = table["doc_id"].to_pylist(), table["text"].to_pylist()
            for doc_id, text in zip(ids, texts, strict=True):
                chosen.append((shuffle_key(doc_id, seed), doc_id, text or ""))
            chosen = sorted(chosen)[:count]
    return [text for _, _, text in chosen]


def write(directory: Path, files: int = 3, rows: int = 50, **columns: object) -> list[Path]:
    made = []
    for number in range(files):
        texts = [f"document {number}-{row} " + "é" * row for row in range(rows)]
        table = pa.table({"text": pa.array(texts, pa.large_string())})
        for name, value in columns.items():
            values = [value(number, row) if callable(value) else value for row in range(rows)]
            table = table.append_column(name, pa.array(values, pa.string()))
        made.append(directory / f"part-{number}.parquet")
        pq.write_table(table, made[-1], row_group_size=7)
    return made


def name(number: int, row: int) -> str:
    return f"{number:02x}{row:030x}"


def test_the_same_documents_as_a_plain_sample(tmp_path: Path) -> None:
    files = write(tmp_path, doc_id=name)
    for count in (1, 7, 40, 1000):
        drawn = draw_sample(files, count, 5)
        assert [excerpt.text for excerpt in drawn] == sample_texts(files, count, 5)
    assert draw_sample(files, 10, 5) != draw_sample(files, 10, 6)
    assert draw_sample(files, 40, 5)[:7] == draw_sample(files, 7, 5)


def test_domain_and_language(tmp_path: Path) -> None:
    files = write(
        tmp_path,
        files=1,
        rows=4,
        doc_id=name,
        domain=lambda number, row: f"d{row % 2}",
        language=lambda number, row: ("en", None)[row % 2],
    )
    drawn = sorted(draw_sample(files, 9, 0), key=lambda excerpt: excerpt.text)
    assert [(e.domain, e.language) for e in drawn] == [("d0", "en"), ("d1", None)] * 2


def test_files_without_names(tmp_path: Path) -> None:
    files = write(tmp_path, files=2, rows=3)
    drawn = draw_sample(files, 10, 0)
    assert len(drawn) == 6
    assert [e.text for e in drawn] == sample_texts(files, 10, 0)
    assert {(e.domain, e.language) for e in drawn} == {("documents", None)}


def test_a_limit_of_bytes(tmp_path: Path) -> None:
    files = write(tmp_path, doc_id=name)
    drawn = draw_sample(files, 100, 1)
    sizes = [len(excerpt.text.encode()) for excerpt in drawn]
    limit = sum(sizes[:10])
    assert draw_sample(files, 100, 1, limit) == drawn[:10]
    assert draw_sample(files, 100, 1, limit + 1) == drawn[:11]
    assert draw_sample(files, 100, 1, 1) == drawn[:1]
    assert draw_sample(files, 100, 1, 10**9) == drawn


def test_texts_that_are_missing(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"doc_id": ["a"], "text": pa.array([None], pa.string())}), file)
    assert draw_sample([file], 3, 0) == [Excerpt("", "documents", None)]
