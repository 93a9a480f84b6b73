"""How fast evaluation items are looked for: `python tests/benchmarks/decontamination.py --help`.

One core, CPU seconds, the same documents for all: this project's scan, one pass over the same bytes
(numba; what merely reading them costs), copying them, and, when a Python with datatrove is given,
its NGramsDecontFilter with the same n-grams of the same items. The ratios mean the most.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

import numba as nb
import numpy as np
import pyarrow as pa

from raylign.config import DecontaminateConfig
from raylign.config.decontamination import EvaluationSetConfig
from raylign.data.decontamination.evaluation_sets import load_items
from raylign.data.decontamination.index import Index, Item, build_index, find_matches
from raylign.data.decontamination.removal import decontaminate
from raylign.data.words import split_words

SETS = {
    "gsm8k": "gsm8k/test.jsonl",
    "humaneval": "humaneval/HumanEval.jsonl.gz",
    "mbpp": "mbpp/mbpp.jsonl",
    "mmlu": "mmlu/test",
    "truthfulqa": "truthfulqa/TruthfulQA.csv",
}

# datatrove hashes the n-grams of an answer ("text" of a document); its filter drops the documents
# in which any of them occurs.
PEER = """
import json, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from datatrove.data import Document
from datatrove.pipeline.decont.n_grams import (
    NGramsDecontConfig, NGramsDecontFilter, NGramsDecontIndexer,
)
given = json.loads(Path(sys.argv[1]).read_text())
config = NGramsDecontConfig(n_grams=given["ngram"])
folder = tempfile.mkdtemp()
scan = NGramsDecontFilter(folder, config)
# The indexer itself asks for lighteval, which loads the tasks that it knows.
part = SimpleNamespace(config=config, tokenizer=scan.tokenizer, hash_func=scan.hash_func)
hashes = {h for text in given["items"] for h in NGramsDecontIndexer.compute_hashes(part, text)}
np.array(sorted(hashes), config.hash_config.np_descr).tofile(f"{folder}/all.index.hashes")
documents = [Document(text=text, id=str(n)) for n, text in enumerate(given["texts"])]
scan.filter(documents[0])
started = time.process_time()
found = [n for n, document in enumerate(documents) if scan.filter(document) is not True]
print(json.dumps({"seconds": time.process_time() - started, "found": found, "ngrams": len(hashes)}))
"""


def read_texts(data: Path) -> list[str]:
    """Web pages, encyclopedia articles and a few planted questions."""
    texts = [json.loads(line)["text"] for line in (data / "web/c4_demo.jsonl").open()]
    texts += [line for line in (data / "web/wiki_demo.txt").read_text().split("\n") if line]
    questions = [json.loads(line)["question"] for line in (data / SETS["gsm8k"]).open()]
    for number in range(0, len(texts), 50):
        texts[number] += "\n" + questions[number]
    return texts


def load_sets(data: Path) -> list[Item]:
    """The public evaluation sets."""
    against = tuple(EvaluationSetConfig(task=t, path=data / path) for t, path in SETS.items())
    return load_items(DecontaminateConfig(against=against))


@nb.njit(nogil=True)
def scan_bytes(data: np.ndarray) -> int:
    """Reads every byte once, deciding something at each."""
    spaces = 0
    inside = False
    for byte in data:
        letter = byte > 32
        spaces += inside and not letter
        inside = letter
    return spaces


def measure(work: Callable[[], object], repeats: int) -> float:
    """The least CPU seconds."""
    work()
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best


def measure_peer(python: Path, texts: list[str], items: list[Item], ngram: int) -> dict:
    """Seconds, documents found and n-grams of datatrove."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder, "given.json")
        given.write_text(
            json.dumps({"texts": texts, "items": [item.text for item in items], "ngram": ngram})
        )
        program = Path(folder, "peer.py")
        program.write_text(PEER)
        done = subprocess.run(
            [python, program, given], capture_output=True, text=True, cwd=folder, check=False
        )
    if done.returncode:
        raise SystemExit(f"datatrove failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, size: float, seconds: float, reference: float, note: str = "") -> None:
    """One line of the table."""
    sys.stdout.write(
        f"{name:<34}{size / seconds / 1e6:>10,.2f} MB/s{reference / seconds:>12,.3f} x   {note}\n"
    )


def describe(index: Index) -> str:
    """Its size."""
    parts = ("blocks", "keys", "numbers", "bounds", "owners", "places")
    size = sum(getattr(index, part).nbytes for part in parts)
    return (
        f"{len(index.names):,} items, {index.entries:,} n-grams of {len(index.lengths)} lengths, "
        f"{size / 2**20:.1f} MiB of which filters {index.blocks.nbytes / 2**20:.1f} MiB"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--datatrove-python", type=Path, help="interpreter that has datatrove")
    parser.add_argument("--ngram", type=int, default=13)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    items, texts = load_sets(options.data), read_texts(options.data)
    config = DecontaminateConfig(ngram=options.ngram)
    started = time.process_time()
    index = build_index(items, options.ngram)
    built = time.process_time() - started
    few = sum(len(text.encode()) for text in texts)
    array = pa.array(texts * 8, pa.large_string())
    data = np.frombuffer(array.buffers()[2], np.uint8)
    size = len(data)
    sys.stdout.write(f"{describe(index)}; built in {built:.1f} s\n")
    sys.stdout.write(f"{len(array):,} documents, {size / 1e6:.1f} MB\n")
    ours = measure(lambda: find_matches(array, index), options.repeats)
    show("split into words", size, measure(lambda: split_words(array), options.repeats), ours)
    show("split and find n-grams", size, ours, ours)
    whole = measure(lambda: decontaminate(array, index, config), options.repeats)
    found = decontaminate(texts, index, config)
    show("decontaminate (lines, hits)", size, whole, ours, f"{len(found)} documents affected")
    show("one pass over the bytes (numba)", size, measure(lambda: scan_bytes(data), 3), ours)
    show("copy of the bytes", size, measure(data.copy, 3), ours)
    if options.datatrove_python:
        peer = measure_peer(options.datatrove_python, texts, items, options.ngram)
        note = f"{len(peer['found'])} documents affected, {peer['ngrams']:,} n-grams"
        show("datatrove NGramsDecontFilter", few, peer["seconds"], ours * few / size, note)
        both = sorted(set(peer["found"]) & set(found))
        sys.stdout.write(
            f"affected for both {len(both)}, for this project alone {len(found) - len(both)}, "
            f"for datatrove alone {len(peer['found']) - len(both)}\n"
        )


if __name__ == "__main__":
    main()
