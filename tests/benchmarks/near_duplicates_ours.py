"""This project's part of `near_duplicates.py`: `near_duplicates_ours.py CORPUS OUTPUT`.

Parquet in; kept and excluded documents as Parquet out, on a Ray of its own with two CPUs. Prints
the seconds of each stage as JSON.
"""

from __future__ import annotations

import io
import json
import sys
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]


def deduplicate(corpus: Path, output: Path) -> dict[str, float]:
    """Sign, compare and write; wall seconds of each step."""
    marks = [("", time.monotonic())]

    def mark(name: str) -> None:
        marks.append((name, time.monotonic()))

    import pyarrow.parquet as pq
    from rich.console import Console

    from raylign.config import DedupConfig, PrepareConfig, RayConfig, SourceConfig
    from raylign.data.corpus.features import sign_documents
    from raylign.data.corpus.pipeline import Inputs, build_corpus
    from raylign.runtime import connect, disconnect
    from raylign.tracking import ProgressBoard

    mark("imports")
    connect(RayConfig(num_cpus=2))
    mark("Ray")
    config = PrepareConfig(
        sources=(SourceConfig(kind="parquet", path=corpus),),
        dedup=DedupConfig(keep="first"),
        english_held_out_share=0.0,
    )
    files = [
        {
            "number": number,
            "file": str(file),
            "used": pq.read_metadata(file).num_rows,
            "kind": "parquet",
            "source": "planted",
            "signals": "",
            "quality": None,
        }
        for number, file in enumerate(sorted(corpus.glob("part-*.parquet")))
    ]
    signatures = output / "signatures"
    signatures.mkdir(parents=True)
    with ProgressBoard(Console(file=io.StringIO())) as board:
        sign_documents(files, config.dedup, signatures, board)
        mark("sign")
        stems = tuple(str(signatures / f"part-{row['number']:06d}") for row in files)
        build_corpus(Inputs(files=files, stems=stems), config, 0, output / "corpus", board)
    mark("compare, decide, write")
    disconnect()
    mark("end")
    return {name: round(at - before, 2) for (_, before), (name, at) in pairwise(marks)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(deduplicate(Path(sys.argv[1]), Path(sys.argv[2]))) + "\n")
