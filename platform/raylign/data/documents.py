"""Reading documents back: the files of a corpus, and a sample of their texts."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from raylign.config import UserError


def list_document_files(directory: Path, key: str) -> list[Path]:
    """Parquet files of a `corpus` stage, or of any directory of them, in order.

    Raises `UserError` naming `key` when there are none, or one has no `text` column.
    """
    inner = directory / "documents"
    files = sorted((inner if inner.is_dir() else directory).glob("*.parquet"))
    if not files:
        raise UserError(f"{key}={directory}: holds no Parquet files of documents; correct the path")
    for file in files:
        try:
            names = pq.read_schema(file).names
        except (pa.ArrowInvalid, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{key}: {file} is not a readable Parquet file ({reason})") from None
        if "text" not in names:
            raise UserError(f"{key}: {file} has no column 'text'; it has {', '.join(names)}")
    return files


def read_table(file: Path) -> pa.Table:
    """`doc_id` and `text` of one file; documents without an id are known by file and row."""
    columns = [n for n in ("doc_id", "text") if n in pq.read_schema(file).names]
    table = pq.read_table(file, columns=columns)
    if "doc_id" not in columns:
        ids = pa.array([f"{file.name}#{row}" for row in range(table.num_rows)], pa.string())
        table = table.append_column("doc_id", ids)
    return table


def shuffle_key(doc_id: str, seed: int) -> int:
    """64 bits; sorting documents by it shuffles them, the same way wherever it is computed."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{doc_id}".encode())


def sample_texts(files: list[Path], count: int, seed: int) -> list[str]:
    """At most `count` texts, chosen and ordered by `shuffle_key`."""
    chosen: list[tuple[int, str, str]] = []
    for file in files:
        table = read_table(file)
        for doc_id, text in zip(
            table["doc_id"].to_pylist(), table["text"].to_pylist(), strict=True
        ):
            chosen.append((shuffle_key(doc_id, seed), doc_id, text or ""))
        chosen = sorted(chosen)[:count]
    return [text for _, _, text in chosen]
