"""Tokenising and packing under real Ray."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from rich.console import Console
from tokenizers import Tokenizer

import raylign
from raylign.config import MixtureConfig, UserError
from raylign.data.documents import list_document_files, shuffle_key
from raylign.data.packing import PackedShards, pack, verify
from raylign.data.shards import tokenise
from raylign.data.shards.pack import pack_corpus
from raylign.data.shards.tokenise import Vocabulary, tokenise_part
from raylign.tokenization.train import train_bpe
from raylign.tracking import ProgressBoard

PARTS = 6


@pytest.fixture
def board() -> ProgressBoard:
    return ProgressBoard(Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six hundred documents of two domains; one is empty, one spells the end token, one is long."""
    directory = tmp_path_factory.mktemp("corpus") / "documents"
    directory.mkdir()
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrst")
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 9, 300)]
    texts = [" ".join(rng.choice(words, rng.integers(1, 60))) for _ in range(597)]
    texts += ["", "one <eos> two <pad>", " ".join(rng.choice(words, 2000))]
    for part in range(PARTS):
        own = texts[part::PARTS]
        table = {
            "doc_id": [f"{part}-{row}" for row in range(len(own))],
            "domain": ["prose" if row % 4 else "code" for row in range(len(own))],
            "text": pa.array(own, pa.large_string()),
        }
        pq.write_table(pa.table(table), directory / f"part-{part}.parquet")
    return directory.parent


@pytest.fixture(scope="module")
def vocabulary(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe([row["text"] for row in read(corpus)], 400).save_pretrained(directory)
    return Vocabulary(directory, "hash", 400, eos=1, pad=0)


def read(corpus: Path) -> list[dict[str, Any]]:
    return [row for f in list_document_files(corpus, "x") for row in pq.read_table(f).to_pylist()]


def make(
    corpus: Path, vocabulary: Vocabulary, directory: Path, share: float = 0.1, **others: Any
) -> dict[str, Any]:
    board = ProgressBoard(Console(file=io.StringIO()))
    files = list_document_files(corpus, "prepare")
    return pack_corpus(files, vocabulary, 64, 20, share, 0, directory, board, **others)


def hash_files(directory: Path) -> dict[str, str]:
    """Those that a stage keeps: hidden ones serve to continue."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.iterdir())
        if not file.name.startswith(".")
    }


def split_documents(directory: Path, split: str) -> list[list[int]]:
    packed = PackedShards(directory, split)
    tokens, segments = packed.read(range(packed.rows))
    flat = tokens.reshape(-1)[segments.reshape(-1) > 0]
    assert len(flat) == packed.tokens
    return [piece[:-1].tolist() for piece in np.split(flat, np.flatnonzero(flat == 1) + 1)[:-1]]


def encode(vocabulary: Vocabulary, texts: list[str]) -> list[list[int]]:
    encoder = Tokenizer.from_file(str(vocabulary.directory / "tokenizer.json"))
    encoder.encode_special_tokens = True
    return [encoder.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.fixture(scope="module")
def packed(
    ray_cluster: None,
    corpus: Path,
    vocabulary: Vocabulary,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("packed")
    return directory, make(corpus, vocabulary, directory)


def test_rows_are_those_of_one_process_packing_in_shuffled_order(
    packed: tuple[Path, dict[str, Any]], corpus: Path, vocabulary: Vocabulary
) -> None:
    directory, summary = packed
    documents = sorted(read(corpus), key=lambda row: shuffle_key(row["doc_id"], 0))
    encoded = [np.array(ids) for ids in encode(vocabulary, [row["text"] for row in documents])]
    held = len(split_documents(directory, "validation"))
    for split, own in (("validation", encoded[:held]), ("train", encoded[held:])):
        shards = PackedShards(directory, split)
        expected = pack(own, 64, vocabulary.eos, vocabulary.pad)
        found = shards.read(range(shards.rows))
        assert (found[0] == expected[0]).all() and (found[1] == expected[1]).all()
        assert (shards.rows, shards.tokens) == (
            summary[f"{split}_rows"],
            summary[f"{split}_tokens"],
        )
    share = summary["validation_tokens"] / (summary["validation_tokens"] + summary["train_tokens"])
    assert 0.1 <= share < 0.12
    size = sum(len(row["text"].encode()) for row in documents)
    assert summary["bytes_per_token"] == round(size / sum(map(len, encoded)), 3)
    assert 0 < summary["padding_share"] < 0.01


def test_index_and_mixture_say_what_there_is(packed: tuple[Path, dict[str, Any]]) -> None:
    directory, summary = packed
    assert verify(directory) == []
    index = json.loads((directory / "index.json").read_text())
    mixture = json.loads((directory / "mixture.json").read_text())
    train = index["splits"]["train"]
    assert [s["rows"] for s in train["shards"][:-1]] == [20] * (len(train["shards"]) - 1)
    assert train["domains"] == {n: d["tokens"] for n, d in mixture["domains"].items()}
    assert sum(train["domains"].values()) == train["tokens"] == mixture["tokens"]
    assert all(domain["epochs"] == 1.0 for domain in mixture["domains"].values())
    assert set(summary["domains"]) == {"code", "prose"}


def test_equal_bytes_however_the_work_is_divided(
    packed: tuple[Path, dict[str, Any]],
    corpus: Path,
    vocabulary: Vocabulary,
    tmp_path: Path,
) -> None:
    context = ray.data.DataContext.get_current()
    limits = context.execution_options.resource_limits
    try:
        context.execution_options.resource_limits = limits.copy(cpu=1)
        make(corpus, vocabulary, tmp_path, part_tokens=1)
    finally:
        context.execution_options.resource_limits = limits
    assert hash_files(tmp_path) == hash_files(packed[0])


def test_mixture_of_whole_documents_in_fitted_rows(
    ray_cluster: None, corpus: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    mixture = MixtureConfig(weights={"code": 1, "prose": 1}, tokens=50_000)
    summary = make(corpus, vocabulary, tmp_path, packing="best_fit", mixture=mixture)
    told = json.loads((tmp_path / "mixture.json").read_text())["domains"]
    rows = read(corpus)
    domains: dict[tuple[int, ...], str] = {}
    for row, ids in zip(rows, encode(vocabulary, [r["text"] for r in rows]), strict=True):
        domains[tuple(ids)] = row["domain"]
    train, held = (
        [tuple(ids) for ids in split_documents(tmp_path, split) if 1 < len(ids) < 63]
        for split in ("train", "validation")
    )
    # Every document that was not cut is there whole, as often as its domain is read.
    assert set(train) | set(held) <= set(domains) | {ids[-(len(ids) % 64) :] for ids in domains}
    assert not set(train) & set(held)
    for name in ("code", "prose"):
        assert told[name]["tokens"] == pytest.approx(25_000, abs=1500)
        counts = {train.count(ids) for ids in set(train) if domains.get(ids) == name}
        assert counts <= {int(told[name]["epochs"]), int(told[name]["epochs"]) + 1}
    assert summary["domains"]["code"]["epochs"] > 1.5 > summary["domains"]["prose"]["epochs"]
    assert 0 < summary["padding_share"] < 0.1


def test_mistakes(
    ray_cluster: None, corpus: Path, vocabulary: Vocabulary, tmp_path: Path, board: ProgressBoard
) -> None:
    with pytest.raises(UserError, match="did you mean 'prose'"):
        make(corpus, vocabulary, tmp_path, mixture=MixtureConfig(weights={"pros": 1, "*": 1}))
    assert not list(tmp_path.iterdir())  # before anything is tokenised
    slow = Vocabulary(tmp_path, "hash", 400, eos=1, pad=0)
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        make(corpus, slow, tmp_path)
    with pytest.raises(UserError, match=r"prepare\.validation_share=1\.0"):
        make(corpus, vocabulary, tmp_path, share=1.0)
    assert make(corpus, vocabulary, tmp_path, share=0.0)["validation_rows"] == 0


def test_a_part_does_not_depend_on_how_it_is_read(
    corpus: Path, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "number": 0,
        "file": str(corpus / "documents" / "part-5.parquet"),
        "tokenizer": str(vocabulary.directory),
        "content": "hash",
        "vocab_size": 400,
        "seed": 0,
    }
    found = []
    for rows, texts, size in ((1024, 256, 1 << 20), (7, 3, 100), (50, 1, 1)):
        for name, value in (("READ_ROWS", rows), ("ENCODE_TEXTS", texts), ("ENCODE_BYTES", size)):
            monkeypatch.setattr(tokenise, name, value)
        (tmp_path / ".work").mkdir(exist_ok=True)
        report = tokenise_part(row, tmp_path)
        assert report["documents"] == 100 and report["domains"] == ["code", "prose"]
        found.append([(tmp_path / name).read_bytes() for name in report["files"]])
    assert found[0] == found[1] == found[2]


DRIVER = """
import io, pickle, sys
from rich.console import Console
from raylign.config import RayConfig
from raylign.data.shards.pack import pack_corpus
from raylign.runtime import connect
from raylign.tracking import ProgressBoard
address, arguments = sys.argv[1], pickle.loads(bytes.fromhex(sys.argv[2]))
connect(RayConfig(address=address))
pack_corpus(*arguments, ProgressBoard(Console(file=io.StringIO())), part_tokens=1)
"""


def test_a_driver_that_is_killed_is_continued(
    packed: tuple[Path, dict[str, Any]], corpus: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    """Killed once while it tokenises and once while it packs; then the same bytes as in one go."""
    import pickle

    files = list_document_files(corpus, "prepare")
    arguments = pickle.dumps((files, vocabulary, 64, 20, 0.1, 0, tmp_path))
    address = ray.get_runtime_context().gcs_address
    root = Path(raylign.__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root.parent)])}
    done = tmp_path / ".done"
    for stage, parts in (("tokenise", PARTS), ("pack", 20)):
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, address, arguments.hex()],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while not (finished := list(done.glob(f"{stage}-*.json"))):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(finished) < parts and not (tmp_path / "index.json").exists()
    (tmp_path / ".train-00000.tokens.npy.1").write_bytes(b"left over by a killed task")
    before = {file.name: file.stat().st_mtime_ns for file in done.iterdir()}
    make(corpus, vocabulary, tmp_path, part_tokens=1)
    assert hash_files(tmp_path) == hash_files(packed[0])
    kept = [name for name, at in before.items() if (done / name).stat().st_mtime_ns == at]
    assert any(name.startswith("pack") for name in kept)
    assert len([name for name in kept if name.startswith("tokenise")]) == PARTS
