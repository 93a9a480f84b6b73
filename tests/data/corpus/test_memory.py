"""Memory of a worker is that of a batch, however long the file."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

WORKER = """
import dataclasses, json, sys
from pathlib import Path
from raylign.config import SignalsConfig, SourceConfig, TextbookConfig
from raylign.data import documents
from raylign.data.corpus import ingest
from raylign.data.corpus.features import measure_part
from raylign.data.sources import gathering
from raylign.data.sources.slices import plan_slices

# Small bounds, so that small files go beyond them many times.
ingest.JOINED_ROWS, gathering.BATCH_DOCUMENTS = 500, 100

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

peaks = []
for name in sys.argv[1:]:
    (part,) = plan_slices([SourceConfig(kind="jsonl", path=name)], TextbookConfig())
    out = Path(name).with_suffix(".out")
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
            text = " ".join(rng.choices(words, k=400))
            size += len(text)
            stream.write(json.dumps({"text": text}) + "\n")
    return size


def test_reading_and_measuring_hold_no_more_of_a_longer_file(tmp_path: Path) -> None:
    few, many = 2500, 20000
    sizes = [write_documents(tmp_path / f"{n}.jsonl.gz", n) for n in (few, many)]
    done = subprocess.run(
        [sys.executable, "-c", WORKER, *(str(tmp_path / f"{n}.jsonl.gz") for n in (few, many))],
        env=os.environ | {"PYTHONPATH": str(ROOT / "platform")},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (before, *counted), (after, *counted_more) = json.loads(done.stdout)
    assert counted == [few, few] and counted_more == [many, many]
    assert after - before < 0.25 * (sizes[1] - sizes[0])
