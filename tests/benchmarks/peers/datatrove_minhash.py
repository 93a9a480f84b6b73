"""Near-duplicates by datatrove: `datatrove_minhash.py CORPUS OUTPUT {spacy,regex}`.

Run by a Python with `datatrove[processing,io]==0.10.0` and `spacy`. Its four MinHash stages with
its default configuration (word 5-grams, 14 bands of 8 rows) and two workers. With `regex` a regular
expression replaces spaCy's words, and nothing else changes. Prints the seconds of each stage and
the CPU seconds that splitting words took, as JSON.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
)
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter

WORKERS = 2


class RegexWords:
    """Words as runs of letters and digits."""

    def __init__(self) -> None:
        self.pattern = re.compile(r"\w+")

    def word_tokenize(self, text: str) -> list[str]:
        return self.pattern.findall(text)


class TimedWords:
    """Another splitter, and the CPU seconds that it takes."""

    def __init__(self, inner) -> None:
        self.inner = inner
        self.seconds = 0.0

    def word_tokenize(self, text: str) -> list[str]:
        started = time.process_time()
        words = self.inner.word_tokenize(text)
        self.seconds += time.process_time() - started
        return words


class TimedSignatures(MinhashDedupSignature):
    """The first stage, which also writes down how long it and its splitter took."""

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        started, before = time.process_time(), self.word_tokenizer.seconds
        super().run(data, rank, world_size)
        spent = {
            "words": self.word_tokenizer.seconds - before,
            "signatures": time.process_time() - started,
        }
        with self.output_folder.open(f"cpu-{rank:05d}.json", "w") as file:
            json.dump(spent, file)


def deduplicate(corpus: Path, output: Path, words: str) -> dict[str, float]:
    """Run the four stages; seconds by stage."""
    tasks, config = len(list(corpus.glob("part-*.parquet"))), MinhashConfig()
    signatures, buckets, clusters = (str(output / n) for n in ("signatures", "buckets", "clusters"))

    def read() -> ParquetReader:
        return ParquetReader(str(corpus), glob_pattern="part-*.parquet", id_key="doc_id")

    sign = TimedSignatures(signatures, config)
    sign.word_tokenizer = TimedWords(RegexWords() if words == "regex" else sign.word_tokenizer)
    removed = ParquetWriter(str(output / "excluded"))
    stages = {
        "sign": ([read(), sign], tasks),
        "buckets": ([MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets),
        "clusters": ([MinhashDedupCluster(buckets, clusters, config, save_cluster_id=True)], 1),
        "filter": (
            [
                read(),
                MinhashDedupFilter(clusters, exclusion_writer=removed),
                ParquetWriter(str(output / "documents")),
            ],
            tasks,
        ),
    }
    seconds = {}
    for name, (pipeline, count) in stages.items():
        started = time.monotonic()
        LocalPipelineExecutor(
            pipeline=pipeline,
            tasks=count,
            workers=min(WORKERS, count),
            logging_dir=str(output / "logs" / name),
        ).run()
        seconds[name] = round(time.monotonic() - started, 1)
    spent = [json.loads(file.read_text()) for file in Path(signatures).glob("cpu-*.json")]
    for name in ("words", "signatures"):
        seconds[f"CPU of {name}"] = round(sum(row[name] for row in spent), 1)
    return seconds


if __name__ == "__main__":
    stages = deduplicate(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    sys.stdout.write(json.dumps(stages) + "\n")
