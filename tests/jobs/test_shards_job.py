"""`python -m jobs.shards`: the last stage alone, of a corpus and a tokenizer that are there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs import shards
from jobs.entry import open_run
from raylign.config import Recipe, UserError
from raylign.data.packing import PackedShards
from raylign.run import Run, verify
from raylign.tokenization.train import train_bpe
from raylign.tracking import ProgressBoard


def go(root: Path, **prepare: Any) -> Run:
    changes = {k: v for k, v in prepare.items() if k != "redo"}
    section = {"sequence_length": 32, "shard_rows": 16} | changes
    recipe = Recipe.model_validate({"run": root, "prepare": section, "redo": prepare.get("redo")})
    run = open_run(recipe)
    shards.run(recipe, run, ProgressBoard(Console(file=io.StringIO())))
    return run


@pytest.fixture(scope="module")
def root(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the two stages that this one reads."""
    root = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklm"), 5)) for _ in range(99)]
    texts = [" ".join(rng.choice(words, 20)) for _ in range(200)]
    with Run(root).write("corpus", {}, {}) as draft:
        (draft.path / "documents").mkdir()
        names = [str(i) for i in range(len(texts))]
        domains = ["a" if i % 4 else "b" for i in range(len(texts))]
        table = pa.table({"doc_id": names, "domain": domains, "text": texts})
        pq.write_table(table, draft.path / "documents" / "part-000000.parquet")
    with Run(root).write("tokenizer", {}, {}) as draft:
        train_bpe(texts, 300).save_pretrained(draft.path)
    return root


def test_shards_of_what_is_there(root: Path) -> None:
    run = go(root)
    stage = run.require("shards", "shards")
    assert verify(stage) == []
    assert not [file for file in stage.path.iterdir() if file.name.startswith(".")]
    assert {"index.json", "mixture.json", "train-00000.tokens.npy"} <= set(stage.manifest.files)
    assert stage.manifest.summary["domains"]["b"]["epochs"] == 1.0
    first = PackedShards(stage.path).tokens
    with pytest.raises(UserError, match=r"prepare\.packing=concatenate, not best_fit"):
        go(root, packing="best_fit")
    mixture = {"weights": {"a": 1, "b": 1}, "tokens": first}
    again = go(root, packing="best_fit", mixture=mixture, redo="shards").require("shards", "shards")
    assert again.manifest.summary["domains"]["b"]["share"] == pytest.approx(0.5, abs=0.02)
    assert PackedShards(again.path).tokens == pytest.approx(first, abs=60)


def test_nothing_to_read(tmp_path: Path, ray_cluster: None) -> None:
    with pytest.raises(UserError, match=r"no finished 'tokenizer' stage; run `python -m jobs\.tok"):
        go(tmp_path)
    with pytest.raises(UserError, match=r"prepare\.tokenizer=.*none: no such"):
        go(tmp_path, tokenizer=str(tmp_path / "none"))
