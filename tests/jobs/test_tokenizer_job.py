"""`python -m jobs.tokenizer` on a small corpus: every kind, compared, and what goes wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from rich.console import Console

from jobs import tokenizer
from jobs.entry import open_run
from raylign.config import Recipe, TokenizerConfig, UserError
from raylign.data.textbook.arithmetic import write_textbook
from raylign.evaluation.report.corpora import build_tokenizer as build_section
from raylign.evaluation.report.findings import read_findings
from raylign.models.loading import load_tokenizer, require_chat_template
from raylign.run import Run, Stage
from raylign.tokenization.train import train_bpe
from raylign.tracking import ProgressBoard

PAGES = list(write_textbook(200, 0, 3, 0.85))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    columns = {
        "doc_id": [f"{row:032x}" for row in range(len(PAGES))],
        "domain": [("sums", "books")[row % 2] for row in range(len(PAGES))],
        "language": [("en", "de")[row % 3 == 0] for row in range(len(PAGES))],
        "text": PAGES,
    }
    pq.write_table(pa.table(columns), directory / "part-0.parquet")
    return directory


def go(root: Path, corpus: Path, **keys: Any) -> tuple[Stage, str]:
    section = {"corpus": str(corpus), "vocab_size": 400, **keys}
    section = {key: value for key, value in section.items() if value is not None}
    recipe = Recipe.model_validate({"run": root, "ray": {"num_cpus": 2}, "tokenizer": section})
    out = io.StringIO()
    run = open_run(recipe)
    made = tokenizer.build_tokenizer(recipe, run, ProgressBoard(Console(file=out, width=200)))
    return made, out.getvalue()


def test_everything_is_compared(ray_cluster: None, corpus: Path, tmp_path: Path) -> None:
    train_bpe(PAGES, 450).save_pretrained(tmp_path / "other")
    words = {"kind": "word", "vocab_size": 60}
    compared = [
        {"kind": "unigram"},
        {"kind": "char"},
        {"kind": "bpe", "vocab_size": 330},
        {"load": str(tmp_path / "other")},
    ]
    keys: dict[str, Any] = {
        "compare": [*compared, words],
        "compare_sizes": [380, 330],
        "paragraph": "What is 1 + 2? é",
        "hidden_size": 64,
        "layers": 2,
    }
    with pytest.raises(UserError, match=r"tokenizer\.compare_sizes=330: .* \(word\)"):
        go(tmp_path / "failed", corpus, **keys)
    keys["compare"] = compared
    stage, said = go(tmp_path / "run", corpus, **keys)
    rows = json.loads((stage.path / "comparison.json").read_text())
    assert [row["name"] for row in rows] == ["bpe 400", "unigram", "char", "bpe 330", "other"]
    assert [row["vocab_size"] for row in rows[:2]] == [400, 400] and rows[4]["vocab_size"] == 450
    for row in rows:
        assert row["documents"] == 4 and row["held_out"] and list(row["languages"]) == ["de", "en"]
        parts = row["domains"].values()
        assert sum(part["tokens"] for part in parts) == row["tokens"]
        embedding = row["vocab_size"] * 64
        assert row["embedding"]["parameters"] == embedding
        share = embedding / (embedding + 12 * 2 * 64 * 64)
        assert row["embedding"]["share"] == pytest.approx(share, abs=1e-4)
        spelt = [piece["text"] for piece in row["paragraph"] if piece["kind"] == "text"]
        assert "".join(spelt).startswith("What is 1 + 2? ")
    assert [size for size, _ in rows[0]["curve"]] == [330, 380]
    assert rows[0]["curve"] == rows[3]["curve"] != rows[1]["curve"]
    assert rows[2]["curve"] == rows[4]["curve"] == []
    assert rows[0]["curve"][0][1] == rows[3]["bytes_per_token"]
    assert "What is" not in (stage.path / "comparison.html").read_text()  # blanks are marked
    assert said.count("MB/s") == 5 and "bytes a token" in said
    assert str(tmp_path / "other") in stage.manifest.parents
    again, _ = go(tmp_path / "again", corpus, **keys)
    assert again.manifest.files == stage.manifest.files, "nothing measured is in the files"


def test_the_default_is_what_it_was(ray_cluster: None, corpus: Path, tmp_path: Path) -> None:
    stage, _ = go(tmp_path / "run", corpus)
    trained = load_tokenizer(stage.path)
    assert len(trained) == 400
    rows = json.loads((stage.path / "comparison.json").read_text())
    assert [row["name"] for row in rows] == ["bpe", "characters", "words"]
    section = build_section(read_findings(tmp_path / "run", None))
    assert section is not None and len(section.blocks) == 2


def test_too_few_documents_to_hold_some_out(
    ray_cluster: None, corpus: Path, tmp_path: Path
) -> None:
    stage, _ = go(tmp_path / "run", corpus, sample_documents=40, vocab_size=300)
    rows = json.loads((stage.path / "comparison.json").read_text())
    assert {(row["documents"], row["held_out"]) for row in rows} == {(40, False)}
    assert "these numbers flatter" in (stage.path / "comparison.html").read_text()


@pytest.mark.parametrize(
    ("keys", "size"),
    [
        ({"kind": "unigram"}, 400),
        ({"kind": "word", "vocab_size": 50}, 50),
        ({"kind": "char", "vocab_size": None, "tags": []}, len(set("".join(PAGES))) + 5),
    ],
)
def test_a_stage_of_another_kind(
    ray_cluster: None, corpus: Path, tmp_path: Path, keys: dict[str, Any], size: int
) -> None:
    stage, _ = go(tmp_path / "run", corpus, **keys)
    trained = load_tokenizer(stage.path)
    require_chat_template(trained, stage.path)
    assert len(trained) == size == stage.manifest.summary["vocab_size"]


def test_a_loaded_stage(ray_cluster: None, corpus: Path, tmp_path: Path) -> None:
    train_bpe(PAGES, 300).save_pretrained(tmp_path / "theirs")
    stage, _ = go(tmp_path / "run", corpus, load=str(tmp_path / "theirs"), vocab_size=None)
    trained = load_tokenizer(stage.path)
    assert len(trained) == 304 and trained("<work>")["input_ids"] == [300]
    rows = json.loads((stage.path / "comparison.json").read_text())
    assert rows[0]["name"] == "theirs" and rows[0]["vocab_size"] == 304


def test_a_sample_of_bytes(ray_cluster: None, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=400: the corpus yields only"):
        go(tmp_path / "run", corpus, sample_bytes=100)


def test_a_corpus_without_text(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"tokenizer\.corpus=.* holds no Parquet files"):
        go(tmp_path / "run", tmp_path / "empty")
    pq.write_table(pa.table({"text": ["", ""]}), tmp_path / "empty" / "a.parquet")
    with pytest.raises(UserError, match=r"tokenizer\.corpus=.*: its documents hold no text"):
        go(tmp_path / "run", tmp_path / "empty")
    assert Run(tmp_path / "run").find("tokenizer") is None
    with pytest.raises(UserError, match=r"tokenizer\.load=.*none: no such file"):
        go(tmp_path / "run", tmp_path / "empty", load=str(tmp_path / "none"), vocab_size=None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"load": "x", "kind": "char"}, "`kind` has no effect on a tokenizer that `load` names"),
        ({"load": "x", "vocab_size": 9}, "`vocab_size` has no effect"),
        ({"load": "tiktoken:"}, "`load` names nothing"),
        ({"pattern": "gpt2"}, "`pattern` belongs to"),
        ({"load": "tiktoken:gpt2", "pattern": "gpt2"}, "`pattern` belongs to"),
        ({"kind": "bpe", "byte_fallback": False}, "is for unigram and char, not for bpe"),
        ({"kind": "unigram", "min_frequency": 2}, "no meaning for unigram"),
        ({"kind": "char", "digits": "grouped"}, "single characters for char"),
        ({"tags": ["<a>", "<a>"]}, "`tags` must differ"),
        ({"tags": [" "]}, "`tags` must differ from each other and not be blank"),
        ({"compare_sizes": [300, 300]}, "names a size twice"),
        ({"kind": "char", "compare_sizes": [300]}, "needs a bpe, unigram or word"),
        ({"kind": "letters"}, "'bpe', 'unigram', 'word' or 'char'"),
        ({"compare": [{"corpus": "x"}]}, "Extra inputs"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TokenizerConfig.model_validate(keys)


def test_a_resolved_section_reads_the_same() -> None:
    config = TokenizerConfig.model_validate({"load": "gpt2", "compare": [{"kind": "char"}]})
    assert TokenizerConfig.model_validate(config.model_dump(mode="json")) == config
