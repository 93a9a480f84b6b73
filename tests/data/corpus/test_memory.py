"""Memory of a worker is that of a batch, however long the file."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa

from raylign.data.documents import read_batches
from raylign.data.tables import TableWriter

ROOT = Path(__file__).resolve().parents[3]

WORKER = """
import dataclasses, json, sys
from pathlib import Path
from raylign.config import SignalsConfig, SourceConfig, TextbookConfig
from raylign.data.corpus import ingest
from raylign.data.corpus.features import measure_part
from raylign.data.sources import gathering
from raylign.data.sources.slices import plan_slices

# Small bounds, so that small files go beyond them many times.
ingest.JOINED_ROWS, gathering.BATCH_DOCUMENTS = 500, 100

def peak():  # bytes since the last call
    lines = Path("/proc/self/status").read_text().splitlines()
    Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

peaks = []
for name in sys.argv[1:]:
    peak()
    (part,) = plan_slices([SourceConfig(kind="jsonl", path=name)], TextbookConfig())
    out = Path(f"{name}.{len(peaks)}")
    for folder in ("documents", "rejected", "signals"):
        (out / folder).mkdir(parents=True)
    row = {k: v for k, v in dataclasses.asdict(part).items() if k != "number"} | {"number": 0}
    report = ingest.read_part(row, out, TextbookConfig(), 0)
    file = str(out / "documents" / "part-000000.parquet")
    measured = measure_part(
        {"number": 0, "file": file, "used": report["documents"]}, out / "signals", SignalsConfig()
    )
    peaks.append((peak(), report["documents"], measured["documents"]))
print(json.dumps(peaks))
"""


def write_documents(file: Path, count: int) -> int:
    """A .jsonl.gz of different documents; bytes of their texts."""
    rng = random.Random(0)
    words = [f"{rng.choice('bcdfgmprst')}{rng.choice('aeiou')}{n:x}" for n in range(2000)]
    size = 0
    with gzip.open(file, "wt", compresslevel=1) as stream:
        for _ in range(count):
            text = " ".join(rng.choices(words, k=500))
            size += len(text)
            stream.write(json.dumps({"text": text}) + "\n")
    return size


def test_tables_of_large_documents_are_small(tmp_path: Path) -> None:
    file = tmp_path / "part.parquet"
    with TableWriter(file, pa.schema([("text", pa.large_string())])) as writer:
        for group in range(4):
            writer.write(pa.table({"text": pa.array([f"{group}" * 1000] * 5, pa.large_string())}))
    tables = list(read_batches(file, ["doc_id", "text"], rows=4))
    assert [len(table) for table in tables] == [4, 1] * 4  # a row group is never joined to another
    ids = [doc_id for table in tables for doc_id in table["doc_id"].to_pylist()]
    assert ids == [f"part.parquet#{row}" for row in range(20)]


def test_reading_and_measuring_hold_no_more_of_a_longer_file(tmp_path: Path) -> None:
    few, many = 4000, 16000
    first, second = tmp_path / "few.jsonl.gz", tmp_path / "many.jsonl.gz"
    sizes = [write_documents(first, few), write_documents(second, many)]
    environment = {"PYTHONPATH": str(ROOT / "platform"), "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, *map(str, [first, first, second])],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    # The first time is to compile and to load; its peak says nothing.
    _, (before, *counted), (after, *counted_more) = json.loads(done.stdout)
    assert counted == [few, few] and counted_more == [many, many]
    assert after - before < 0.5 * (sizes[1] - sizes[0])
