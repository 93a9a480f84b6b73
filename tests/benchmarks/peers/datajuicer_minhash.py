"""Near-duplicates by data-juicer: `datajuicer_minhash.py CORPUS OUTPUT`.

Run by a Python with `py-data-juicer==1.6.1`, `ray[data]` and `aiohttp`. Its
RayBTSMinhashDeduplicator on a Ray of two CPUs, with the shingles and bands of the others (words at
white space, 5-grams, 14 bands of 8 rows). It splits at blanks only, so line ends are folded before;
otherwise it misses copies that are wrapped differently. Prints the seconds of each step as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

CPUS = 2


def fold_line_ends(table: pa.Table) -> pa.Table:
    """The same documents, each text on one line."""
    column = table.schema.get_field_index("text")
    folded = pc.replace_substring_regex(table["text"], r"\s+", " ")
    return table.set_column(column, "text", folded)


def deduplicate(corpus: Path, output: Path) -> dict[str, float]:
    """Mark and remove; seconds by step."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dj") as scratch:
        ray.init(
            address="local",
            num_cpus=CPUS,
            include_dashboard=False,
            object_store_memory=3 << 30,
            log_to_driver=False,
            _temp_dir=scratch,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        from data_juicer.ops.deduplicator.ray_bts_minhash_deduplicator import (
            RayBTSMinhashDeduplicator,
        )

        ready = time.monotonic()
        removal = RayBTSMinhashDeduplicator(
            tokenization="space",
            window_size=5,
            num_permutations=112,
            num_bands=14,
            num_rows_per_band=8,
            work_dir=str(output),
        )
        files = [str(file) for file in sorted(corpus.glob("part-*.parquet"))]
        documents = ray.data.read_parquet(files).map_batches(fold_line_ends, batch_format="pyarrow")
        kept = removal.run(documents)
        merged = time.monotonic()
        kept.write_parquet(str(output / "documents"))
        written = time.monotonic()
        ray.shutdown()
    return {
        "Ray and imports": round(ready - started, 1),
        "sign and merge": round(merged - ready, 1),
        "filter": round(written - merged, 1),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(deduplicate(Path(sys.argv[1]), Path(sys.argv[2]))) + "\n")
