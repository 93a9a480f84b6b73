"""How many documents hold each n-gram of the evaluation sets: one pass that only counts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raylign.data.corpus.features import Files
from raylign.data.corpus.parts import run_parts
from raylign.data.decontamination.index import Index, count_documents
from raylign.data.documents import read_batches
from raylign.tracking import ProgressBoard


def count_occurrences(
    name: str, files: Files, index: Index, directory: Path, board: ProgressBoard
) -> np.ndarray:
    """Documents that hold each entry of `index`; int64 [E]. `name` is that of the pass."""
    work = partial(count_part, index=index, name=name)
    reports = run_parts(name, files, work, directory, board)
    counts = np.load(directory / reports[0]["name"])
    for report in reports[1:]:
        counts = counts + np.load(directory / report["name"])
    return counts


def count_part(row: Mapping[str, Any], directory: Path, index: Index, name: str) -> dict[str, Any]:
    """Write the counts of one file of documents."""
    counts = count_documents([], index)
    left = row["used"]
    for table in read_batches(Path(row["file"]), ["text"]):
        counts = counts + count_documents(table["text"].slice(0, max(0, left)), index)
        left -= len(table)
    file = f"{name}-{row['number']:06d}.npy"
    np.save(directory / file, counts)
    return {"name": file, "files": [file]}
