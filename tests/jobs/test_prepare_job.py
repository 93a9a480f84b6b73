"""`python -m jobs.prepare` in small: real Ray, real tokenizer, every stage."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from jobs import prepare, tokenizer
from jobs.entry import open_run
from raylign.config import Recipe, UserError
from raylign.data.packing import PackedShards, rows_for_step
from raylign.models.loading import load_tokenizer, require_chat_template
from raylign.run import Run, Stage, verify
from raylign.tracking import ProgressBoard

SMALL: dict[str, Any] = {
    "seed": 3,
    "ray": {"num_cpus": 2},
    "prepare": {
        "sources": [{"kind": "pydoc", "limit": 60}, {"kind": "textbook"}],
        "textbook": {"pages": 200, "exercises": 50, "prompts": 30, "held_out": 20},
        "sequence_length": 64,
        "shard_rows": 128,
    },
    "tokenizer": {"vocab_size": 320},
}


def make(directory: Path, **changes: Any) -> Recipe:
    """The small recipe with top-level sections changed."""
    merged = {
        k: {**v, **changes.get(k, {})} if isinstance(v, dict) else v for k, v in SMALL.items()
    }
    merged |= {k: v for k, v in changes.items() if not isinstance(v, dict)}
    return Recipe.model_validate(merged | {"run": directory})


def go(recipe: Recipe) -> tuple[Run, str]:
    out = io.StringIO()
    run = open_run(recipe)
    prepare.run(recipe, run, ProgressBoard(Console(file=out, width=200)))
    return run, out.getvalue()


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    return go(make(tmp_path_factory.mktemp("prepare") / "run"))


def stage(run: Run, name: str) -> Stage:
    found = run.find(name)
    assert found is not None
    return found


def test_three_stages_with_lineage(prepared: tuple[Run, str]) -> None:
    run, _ = prepared
    corpus, trained, shards = (stage(run, name) for name in ("corpus", "tokenizer", "shards"))
    assert trained.manifest.parents == {"corpus": corpus.manifest.content}
    assert shards.manifest.parents == {
        "corpus": corpus.manifest.content,
        "tokenizer": trained.manifest.content,
    }
    read = [stage(run, name) for name in ("documents", "signals", "signatures")]
    assert set(corpus.manifest.parents.values()) == {s.manifest.content for s in read}
    assert not [name for s in (*read, corpus, trained, shards) for name in verify(s)]
    assert {f.name for f in corpus.path.iterdir()} == {
        "documents",
        "excluded",
        "exercises.jsonl",
        "prompts.jsonl",
        "held_out.jsonl",
        "english_held_out.jsonl",
        "funnel.json",
        "kept.npy",
        "manifest.json",
    }
    assert read[0].manifest.settings["python"] == sys.version.split()[0]
    assert corpus.manifest.summary["exercises"] == 50
    assert shards.manifest.summary["train_tokens"] > 30_000
    comparison = json.loads((trained.path / "comparison.json").read_text())
    assert [row["name"] for row in comparison] == ["bpe", "characters", "words"]


def test_what_training_reads(prepared: tuple[Run, str]) -> None:
    run, _ = prepared
    trained = load_tokenizer(stage(run, "tokenizer").path)
    require_chat_template(trained, stage(run, "tokenizer").path)
    packed = PackedShards(stage(run, "shards").path)
    assert packed.vocab_size == len(trained) == 320
    assert packed.tokenizer == stage(run, "tokenizer").manifest.content
    tokens, segments = packed.read(rows_for_step(packed.rows, 0, 7, 16))
    assert tokens.shape == segments.shape == (16, 64)
    assert np.all(tokens < 320)
    assert PackedShards(stage(run, "shards").path, "validation").rows > 0


def test_a_second_run_finds_everything_done(prepared: tuple[Run, str]) -> None:
    run, first = prepared
    assert "documents kept" in first and "bytes a token" in first
    _, second = go(make(run.root))
    assert second.count("already done") == 7
    with pytest.raises(UserError, match=r"stage 'documents' .* was made with seed=3, not 4"):
        go(make(run.root, seed=4))


def test_shards_again_without_the_corpus(prepared: tuple[Run, str]) -> None:
    run, _ = prepared
    before = stage(run, "corpus").manifest.content
    recipe = make(run.root, prepare=SMALL["prepare"] | {"sequence_length": 32}, redo="shards")
    again, text = go(recipe)
    assert text.count("already done") == 5
    assert PackedShards(stage(again, "shards").path).sequence_length == 32
    assert stage(again, "corpus").manifest.content == before


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(prepared: tuple[Run, str], tmp_path: Path) -> None:
    """As a process of its own, with a cluster of one CPU."""
    recipe = {**SMALL, "run": str(tmp_path / "run"), "ray": {"num_cpus": 1}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    root = Path(prepare.__file__).resolve().parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root / "platform"), str(root)])}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.prepare", str(tmp_path / "recipe.yaml")],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Starting execution" not in done.stderr and "Traceback" not in done.stderr
    for name in ("documents", "signals", "signatures", "corpus", "tokenizer"):
        here, there = stage(prepared[0], name), stage(Run(tmp_path / "run"), name)
        assert here.manifest.content == there.manifest.content


def test_given_tokenizer(prepared: tuple[Run, str], tmp_path: Path) -> None:
    run, _ = prepared
    given = stage(run, "tokenizer").path
    own, _ = go(make(tmp_path / "run", prepare=SMALL["prepare"] | {"tokenizer": given}))
    assert own.find("tokenizer") is None
    assert PackedShards(stage(own, "shards").path).vocab_size == 320
    with pytest.raises(UserError, match=r"prepare\.tokenizer=.*none: no such directory"):
        go(make(own.root, prepare=SMALL["prepare"] | {"tokenizer": tmp_path / "none"}))


def test_own_files_are_parents(ray_cluster: None, tmp_path: Path) -> None:
    rows = [
        json.dumps({"text": f"Line {i} of a text that somebody wrote about {i * i} things. " * 3})
        for i in range(80)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows))
    section = SMALL["prepare"] | {"sources": [{"kind": "jsonl", "path": str(file)}]}
    recipe = make(tmp_path / "run", prepare=section, tokenizer={"vocab_size": 280})
    run, _ = go(recipe)
    assert list(stage(run, "documents").manifest.parents) == [str(file)]
    assert set(stage(run, "corpus").manifest.parents) == {"documents", "signals", "signatures"}
    assert "python" not in stage(run, "documents").manifest.settings
    file.write_text("\n".join(rows[:-1]))
    with pytest.raises(UserError, match=r"was made with another .*rows\.jsonl"):
        go(recipe)


def test_mistakes_come_before_work(tmp_path: Path) -> None:
    board = ProgressBoard(Console(file=io.StringIO()))
    run = Run(tmp_path / "run")
    with pytest.raises(
        UserError, match=r"no finished 'corpus' stage; run `python -m jobs\.prepare`"
    ):
        tokenizer.run(make(run.root), run, board)
    section = SMALL["prepare"] | {"sources": [{"kind": "jsonl", "path": "nowhere.jsonl"}]}
    with pytest.raises(UserError, match=r"prepare\.sources\.0\.path=nowhere\.jsonl: no such file"):
        go(make(run.root, prepare=section))
    with pytest.raises(UserError, match="no 'prepare' section"):
        prepare.run(Recipe(run=run.root), run, board)
    empty = {"corpus": tmp_path}
    with pytest.raises(UserError, match=r"tokenizer\.corpus=.*: holds no Parquet files"):
        tokenizer.run(make(run.root, tokenizer=empty), run, board)


def test_a_vocabulary_too_large_names_its_key(prepared: tuple[Run, str], tmp_path: Path) -> None:
    run, _ = prepared
    board = ProgressBoard(Console(file=io.StringIO()))
    large = {"vocab_size": 60_000, "corpus": stage(run, "corpus").path}
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=60000: the corpus yields only"):
        tokenizer.run(make(tmp_path / "run", tokenizer=large), Run(tmp_path / "run"), board)
    assert Run(tmp_path / "run").find("tokenizer") is None
