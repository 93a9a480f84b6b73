"""Datasets of Hugging Face: a directory, one that `save_to_disk` wrote, or a name on the hub.

A directory is read by its files where it can be. From the hub, rows are streamed; a slice is one of
the shards the hub serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from raylign.config import SourceConfig, UserError
from raylign.data.sources.columnar import READ_ROWS, read_batch
from raylign.data.sources.columns import require_columns
from raylign.data.sources.cuts import Cut, Slice
from raylign.data.sources.fingerprints import identify_files
from raylign.data.sources.rows import Row, reject
from raylign.data.sources.storage import list_stored

ROWS_A_SLICE = 50_000


def cut(source: SourceConfig, key: str) -> Iterator[Cut]:
    """Shards of a dataset, or runs of rows of a saved one. Raises `UserError` when it cannot be
    opened, or lacks a column of the recipe."""
    path, options = str(source.path), (source.name or "", source.split, source.revision or "")
    dataset = _open(path, options, key)
    names = dataset.column_names
    if names:
        require_columns(source, names, path, key)
    if _is_saved(path):
        root = str(Path(path).resolve())
        identity = str(getattr(dataset, "_fingerprint", ""))
        for start in range(0, len(dataset), ROWS_A_SLICE):
            stop = min(start + ROWS_A_SLICE, len(dataset))
            yield Cut(root, source.split, start, stop, identity, options)
        return
    identity = ""
    if Path(path).is_dir():
        identity = identify_files(list_stored(path, ("",), key))
        path = str(Path(path).resolve())
    for shard in range(dataset.num_shards):
        yield Cut(path, f"{source.split}-{shard:05d}", shard, shard + 1, identity, options)


def read(part: Slice) -> Iterator[Row | pa.Table]:
    """Tables of `gathering.RAW`, from whole batches; a shard that breaks off is a rejected row."""
    name, split, revision = part.options
    dataset = _open(part.path, (name, split, revision), f"source {part.source!r}")
    if _is_saved(part.path):
        first = part.start
        batches = _read_saved(dataset, part.start, part.stop)
    else:
        first = 0
        shard = dataset.shard(num_shards=dataset.num_shards, index=part.start)
        batches = _read_streamed(shard)
    row = first
    try:
        for batch in batches:
            yield from read_batch(batch, row, part, part.columns)
            row += batch.num_rows
    except (OSError, ValueError, pa.ArrowException) as error:
        yield reject(f"{part.name}#{row}", row, str(error).encode(), "unreadable_shard")


def _read_saved(dataset: Any, start: int, stop: int) -> Iterator[pa.RecordBatch]:
    rows = dataset.with_format("arrow")
    for at in range(start, stop, READ_ROWS):
        yield from rows[at : min(at + READ_ROWS, stop)].combine_chunks().to_batches()


def _read_streamed(shard: Any) -> Iterator[pa.RecordBatch]:
    for table in shard.with_format("arrow").iter(READ_ROWS):
        yield from table.combine_chunks().to_batches()


def _is_saved(path: str) -> bool:
    return any(Path(path, name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def _open(path: str, options: tuple[str, str, str], key: str) -> Any:
    """A `Dataset` (saved) or an `IterableDataset`."""
    import datasets

    name, split, revision = options
    try:
        if _is_saved(path):
            saved = datasets.load_from_disk(path)
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if split not in saved:
                raise UserError(
                    f"{key}.split={split}: {path} has the splits {', '.join(saved)}; name one"
                )
            return saved[split]
        return datasets.load_dataset(
            path, name or None, split=split, revision=revision or None, streaming=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{key}.path={path}: the dataset cannot be opened ({reason}); correct path, name, "
            "split or revision, or give a local directory where the hub cannot be reached"
        ) from None
