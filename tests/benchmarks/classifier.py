"""Scoring documents: `python tests/benchmarks/classifier.py [DOCUMENTS]`.

Random documents of 2.6 kB are scored by a fitted classifier, and by scikit-learn's
HashingVectorizer with a linear model of the same size: words and pairs, log-damped, unit length.
Prints MB a CPU second of both, and the ratio.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

import numpy as np
import pyarrow as pa

from raylign.config.synthesis import FitConfig
from raylign.data.quality.classifier import Classifier


def write_documents(count: int) -> list[str]:
    """Documents over 50,000 made-up words, drawn by Zipf's law."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlu"))
    words = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(50_000)]
    share = 1 / np.arange(1, len(words) + 1)
    drawn = rng.choice(len(words), (count, 400), p=share / share.sum())
    return [" ".join(words[w] for w in row) for row in drawn]


def measure_ours(texts: list[str], bits: int) -> float:
    """Seconds of CPU."""
    weights = np.random.default_rng(1).normal(size=1 << bits).astype(np.float32)
    weights.setflags(write=False)
    classifier = Classifier(weights, 2.0, FitConfig(bits=bits), {}, "")
    column = pa.array(texts, pa.large_string())
    classifier.score(column[:2])
    started = time.process_time()
    classifier.score(column)
    return time.process_time() - started


def measure_sklearn(texts: list[str], bits: int) -> float:
    """Seconds of CPU."""
    from sklearn.feature_extraction.text import HashingVectorizer

    weights = np.random.default_rng(1).normal(size=1 << bits)
    vectorizer = HashingVectorizer(
        ngram_range=(1, 2), n_features=1 << bits, norm=None, alternate_sign=False
    )
    started = time.process_time()
    features = vectorizer.transform(texts)
    features.data = 1 + np.log(features.data)
    scale = np.sqrt(features.multiply(features).sum(axis=1)).A1
    np.clip(features @ weights / scale, 0, 5)
    return time.process_time() - started


if __name__ == "__main__":
    documents = write_documents(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
    size = sum(map(len, documents)) / 1e6
    for exponent in (18, 20):
        own = measure_ours(documents, exponent)
        peer = measure_sklearn(documents[: len(documents) // 4], exponent) * 4
        sys.stdout.write(
            f"2^{exponent} weights   ours {size / own:7.1f} MB/s   "
            f"scikit-learn {size / peer:7.1f} MB/s   ratio {peer / own:.1f}\n"
        )
