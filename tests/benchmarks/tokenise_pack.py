"""Tokenising and packing beside `datasets`: `python tests/benchmarks/tokenise_pack.py [DOCUMENTS]`.

The same generated documents with the same BPE, in CPU seconds of the whole process tree (Ray, its
workers and all imports are up before): Raylign's two passes; `datasets.map` with transformers' fast
tokenizer and then the usual `group_texts`, both batched in two processes; and the bare tokenizers
library in one process, encoding and throwing the tokens away, which is the limit for either.

Ours also shuffles all documents, keeps segments, and hashes what it writes; the peer does not, and
drops the rest of every thousand documents that does not fill a row.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

LENGTH, VOCABULARY, PARTS, EOS = 1024, 8000, 8, 1


def write_corpus(directory: Path, count: int) -> None:
    """Documents of about 300 words with the frequencies of words (Zipf), and a tokenizer."""
    from raylign.tokenization.train import train_bpe

    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    weights = 1 / np.arange(2, 28)
    words = np.array(
        [
            "".join(rng.choice(letters, size, p=weights / weights.sum()))
            for size in rng.integers(1, 11, 40_000)
        ]
    )
    texts = []
    for size in rng.integers(50, 550, count):
        drawn = words[np.minimum(rng.zipf(1.2, size) - 1, len(words) - 1)]
        texts.append(". ".join(" ".join(part) for part in np.array_split(drawn, size // 12 + 1)))
    (directory / "documents").mkdir()
    for part in range(PARTS):
        own = texts[part::PARTS]
        names = [f"{part}-{row}" for row in range(len(own))]
        table = pa.table({"doc_id": names, "text": pa.array(own, pa.large_string())})
        pq.write_table(table, directory / "documents" / f"part-{part}.parquet")
    train_bpe(texts[:3000], VOCABULARY).save_pretrained(directory / "tokenizer")


def list_files(directory: Path) -> list[Path]:
    return sorted((directory / "documents").glob("*.parquet"))


def count_cpu() -> float:
    """CPU seconds of this process, what it started, and what has ended of it."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


def run_raylign(directory: Path) -> str:
    """CPU and wall seconds, tokens, and the CPU seconds of starting the workers."""
    from rich.console import Console

    from raylign.config import RayConfig
    from raylign.data.shards.pack import pack_corpus
    from raylign.data.shards.tokenise import Vocabulary
    from raylign.runtime import connect, disconnect
    from raylign.tracking import ProgressBoard

    connect(RayConfig(num_cpus=2))
    vocabulary = Vocabulary(directory / "tokenizer", "", VOCABULARY, eos=EOS, pad=0)
    board = ProgressBoard(Console(file=io.StringIO()))
    (directory / "few").mkdir()
    for part in range(2):
        few = pq.read_table(list_files(directory)[part]).slice(0, 20)
        pq.write_table(few, directory / "few" / f"part-{part}.parquet")
    found = {}
    for name in ("few", "documents"):  # the first starts the workers
        started, wall = count_cpu(), time.monotonic()
        target = directory / f"{name}.shards"
        target.mkdir()
        files = sorted((directory / name).glob("*.parquet"))
        told = pack_corpus(files, vocabulary, LENGTH, 2048, 0.0, 0, target, board)
        found[name] = (count_cpu() - started, time.monotonic() - wall, told["train_tokens"])
    disconnect()
    return " ".join(map(str, (*found["documents"], found["few"][0])))


def run_datasets(directory: Path) -> str:
    """CPU and wall seconds, tokens, and the CPU seconds of the second map."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer")

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = tokenizer([f"{text}<eos>" for text in batch["text"]], add_special_tokens=False)
        return dict(found)

    def group(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        joined = {key: list(chain(*values)) for key, values in batch.items()}
        total = len(joined["input_ids"]) // LENGTH * LENGTH
        cut = {
            key: [values[start : start + LENGTH] for start in range(0, total, LENGTH)]
            for key, values in joined.items()
        }
        return cut | {"labels": cut["input_ids"].copy()}

    started, wall = count_cpu(), time.monotonic()
    rows = datasets.Dataset.from_parquet(
        [str(file) for file in list_files(directory)], cache_dir=str(directory / "cache")
    )
    rows = rows.map(encode, batched=True, num_proc=2, remove_columns=rows.column_names)
    between = count_cpu()
    rows = rows.map(group, batched=True, num_proc=2)
    ended, wall = count_cpu(), time.monotonic() - wall
    tokens = len(rows) * LENGTH
    return f"{ended - started} {wall} {tokens} {ended - between}"


def run_bare(directory: Path) -> str:
    """CPU and wall seconds, and tokens."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
    texts = [t for f in list_files(directory) for t in pq.read_table(f)["text"].to_pylist()]
    started, wall, tokens = time.process_time(), time.monotonic(), 0
    for start in range(0, len(texts), 256):
        encoded = encoder.encode_batch_fast(texts[start : start + 256], add_special_tokens=False)
        tokens += sum(map(len, encoded)) + len(encoded)
    return f"{time.process_time() - started} {time.monotonic() - wall} {tokens}"


def measure(kind: str, directory: Path) -> list[float]:
    """One contestant in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, kind, str(directory)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return [float(number) for number in done.stdout.split()]


def compare(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_corpus(directory, count)
        found = {kind: measure(kind, directory) for kind in RUNS}
    rates = {kind: numbers[2] / numbers[0] for kind, numbers in found.items()}
    for kind, numbers in found.items():
        sys.stdout.write(
            f"{kind:<10} {numbers[2] / 1e6:6.2f} M tokens {numbers[0]:7.1f} CPU s "
            f"{numbers[1]:6.1f} s  {rates[kind]:>9,.0f} tokens a CPU s\n"
        )
    spent, second = found["datasets"][0], found["datasets"][3]
    sys.stdout.write(
        f"ratio to datasets {rates['raylign'] / rates['datasets']:.2f}, to the bare library "
        f"{rates['raylign'] / rates['bare']:.2f}\n"
        f"raylign: starting the workers, once {found['raylign'][3]:.1f} CPU s\n"
        f"datasets: first map (encoding to Python lists, an attention mask, Arrow) "
        f"{spent - second:.1f} CPU s, second (lists joined, cut and copied) {second:.1f}\n"
    )


RUNS = {"bare": run_bare, "datasets": run_datasets, "raylign": run_raylign}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in RUNS:
        sys.stdout.write(RUNS[sys.argv[1]](Path(sys.argv[2])))
    else:
        compare(int(sys.argv[1]) if len(sys.argv) > 1 else 40_000)
