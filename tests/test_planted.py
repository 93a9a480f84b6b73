"""The corpus of the near-duplicate benchmark, and the measures that are taken on it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import duplicate_quality
import planted
import process_tree
import pyarrow.parquet as pq

DOCUMENTS = 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("planted")
    planted.write_corpus(directory, DOCUMENTS)
    return directory


@pytest.fixture(scope="module")
def texts(corpus: Path) -> list[str]:
    return pq.read_table(corpus / "part-000000.parquet")["text"].to_pylist()


def shingles(text: str) -> set[tuple[str, ...]]:
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def jaccard(one: str, two: str) -> float:
    a, b = shingles(one), shingles(two)
    return len(a & b) / len(a | b)


def test_documents_do_not_depend_on_how_the_corpus_is_cut(texts: list[str]) -> None:
    chain, plan = planted.learn_chain(), planted.plan_documents(DOCUMENTS)
    pieces = [planted.write_texts(chain, plan, at, at + 50) for at in range(0, DOCUMENTS, 50)]
    assert [text for piece in pieces for text in piece.to_pylist()] == texts
    other = planted.write_texts(chain, plan, 0, 50, seed=1).to_pylist()
    assert not set(other) & set(texts)


def test_copies_are_as_similar_as_intended(corpus: Path, texts: list[str]) -> None:
    truth = pq.read_table(corpus / "truth.parquet").to_pylist()
    assert len(truth) == DOCUMENTS * planted.COPIES
    assert {row["kind"] for row in truth} == set(planted.KINDS)
    errors = []
    for row in truth:
        found = jaccard(texts[row["document"]], texts[row["base"]])
        if row["kind"] == "wrapped":
            assert found == 1 and texts[row["document"]].split() == texts[row["base"]].split()
        errors.append(found - row["similarity"])
    assert np.abs(errors).mean() < 0.06
    assert abs(np.mean(errors)) < 0.02


def test_pairs_are_those_of_brute_force(corpus: Path, texts: list[str]) -> None:
    found = duplicate_quality.read_shingles([corpus / "part-000000.parquet"])
    own = [shingles(text) for text in texts]
    assert np.diff(found.offsets).tolist() == [len(s) for s in own]
    expected = {}
    for i, j in itertools.combinations(range(DOCUMENTS), 2):
        shared = len(own[i] & own[j])
        union = len(own[i]) + len(own[j]) - shared
        if shared >= 0.5 * union:
            expected[i, j] = shared / union
    pairs = duplicate_quality.find_pairs(found)
    got = dict(zip(map(tuple, pairs.documents.tolist()), pairs.similarity.tolist(), strict=True))
    assert got == pytest.approx(expected)
    assert len(got) > 30
    assert duplicate_quality.compare(found, pairs.documents) == pytest.approx(pairs.similarity)


def test_unrelated_documents_share_little(corpus: Path) -> None:
    found = duplicate_quality.read_shingles([corpus / "part-000000.parquet"])
    plan = planted.plan_documents(DOCUMENTS)
    pairs = duplicate_quality.find_pairs(found)
    assert (plan.base[pairs.documents[:, 0]] == plan.base[pairs.documents[:, 1]]).all()


def test_the_whole_process_tree_counts() -> None:
    burn = "import time; x = bytearray(b'x') * {}; s = time.process_time()\n"
    burn += "while time.process_time() - s < 0.6: pass"
    script = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {burn.format(10**8)!r}])\n"
        f"exec({burn.format(1)!r})\n"
        "child.wait(); print('done')\n"
    )
    # In a process of its own: it takes in whatever its descendants leave behind.
    program = (
        f"import sys; sys.path.insert(0, {str(Path(process_tree.__file__).parent)!r})\n"
        "from process_tree import measure\n"
        f"usage = measure([sys.executable, '-c', {script!r}])\n"
        "print(usage.output.strip(), usage.returncode, usage.cpu_seconds, usage.peak_bytes)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    word, code, seconds, peak = result.stdout.split()
    assert (word, code) == ("done", "0")
    assert 1.2 <= float(seconds) < 3
    assert 10**8 <= int(peak) < 2 * 10**8
