"""The whole job on a real vLLM engine; the model is random, so the filters are asked for little."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs.synthesise import run as synthesise
from raylign.config import Recipe, UserError
from raylign.data.documents import DOCUMENTS, list_document_files, read_table
from raylign.run import Run, Stage
from raylign.tracking import ProgressBoard

pytestmark = pytest.mark.slow

STYLES = [
    {"name": "plain", "instruction": "w1 {topic} w2", "share": 2},
    {"name": "grave", "instruction": "w3 {audience} {topic}", "answer": "worked"},
]
LENIENT = {
    "finished": False,
    "min_chars": 1,
    "max_line_repeat_share": 1.0,
    "max_ngram_repeat_share": 1.0,
    "max_prompt_share": 1.0,
}


def make_recipe(root: Path, model: Path | None, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "model": model,
        "topics": [f"w{n}" for n in range(10, 18)],
        "audiences": ["w4", "w5"],
        "styles": STYLES,
        "prompts": 9,
        "samples": 2,
        "sampling": {"max_tokens": 12},
        "filters": LENIENT,
        "part_samples": 5,
        "rollout": {"max_sequences": 2, "kv_cache_mb": 32, "cpus": 0.5},
    }
    return Recipe.model_validate({"run": root, "seed": 3, "synthesise": settings | changes})


def perform(recipe: Recipe) -> tuple[Stage, str]:
    console = Console(file=io.StringIO(), width=200)
    with ProgressBoard(console) as board:
        synthesise(recipe, Run(recipe.run), board)
    stage = Run(recipe.run).find("synthetic")
    assert stage is not None
    return stage, console.file.getvalue()  # type: ignore[attr-defined]


def read_all(stage: Stage, name: str) -> list[dict[str, Any]]:
    files = sorted((stage.path / name).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_documents_are_written_once_and_know_whence_they_are(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    # Stopped early: what was answered until then has been paid for.
    first, _ = perform(make_recipe(tmp_path / "run", tiny_model, target=3))
    assert first.manifest.summary["accepted"] == 3
    paid = first.manifest.summary["generated"]
    assert 3 <= paid < 18
    early = [row["doc_id"] for row in read_all(first, "documents")]

    # The rest, after more of the answers were lost to a kill in the middle of a line.
    [answers] = (tmp_path / "run/.synthetic.cache").glob("*.jsonl")
    answers.write_bytes(answers.read_bytes()[:-9])
    Run(tmp_path / "run").discard("synthetic")
    slow = {"max_sequences": 4, "cpus": 0.5, "backend": "transformers"}
    whole, said = perform(make_recipe(tmp_path / "run", tiny_model, rollout=slow))
    summary = whole.manifest.summary
    assert summary["outputs"] == 18
    assert summary["generated"] == 18 - (paid - 1)
    assert summary["tokens_per_second"] > 0
    assert "of 18 outputs" in said

    # Everything: nothing is asked again, and no worker starts (there is no room for one).
    Run(tmp_path / "run").discard("synthetic")
    huge = {"count": 99, "cpus": 99.0}
    again, _ = perform(make_recipe(tmp_path / "run", tiny_model, rollout=huge))
    assert again.manifest.summary["generated"] == 0
    assert again.manifest.content == whole.manifest.content

    documents, rejected = read_all(again, "documents"), read_all(again, "rejected")
    assert [row["doc_id"] for row in documents][: len(early)] == early
    assert len(documents) + len(rejected) == 18
    assert summary["rejected_for"]["not_worked"] == sum(
        "not_worked" in row["reasons"] for row in rejected
    )
    assert {json.loads(row["meta"])["style"] for row in rejected} >= {"grave"}
    check_provenance(documents, again, tiny_model)
    files = list_document_files(again.path, "x")
    assert pq.read_schema(files[0]).equals(DOCUMENTS)
    assert read_table(files[0]).num_rows == len(pq.read_table(files[0]))
    assert len(files) == 4  # parts of five outputs, of which some are documents


def check_provenance(documents: list[dict[str, Any]], stage: Stage, model: Path) -> None:
    prompts = {row["prompt_hash"]: row["prompt"] for row in read_all(stage, "prompts")}
    assert len(prompts) == 9
    for row in documents:
        meta = json.loads(row["meta"])
        assert row["domain"] == "synthetic" and row["text"] and meta["synthetic"] is True
        assert meta["style"] == "plain" and meta["audience"] is None
        assert prompts[meta["prompt_hash"]] == f"w1 {meta['topic']} w2"
        assert meta["model"] == model.name and meta["model_hash"] == stage.manifest.parents["model"]
        assert meta["weights_version"] == 0 and meta["sampling"]["max_tokens"] == 12
        assert meta["tokens"] <= 12 and meta["sampling"]["temperature"] == 0.8
    assert len({row["doc_id"] for row in documents}) == len(documents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "synthesise.model"),
        ({"topics": [], "styles": ["textbook"]}, "something to write about"),
        ({"prompts": 999}, "which has 8 different ones"),
        ({"sampling": {"max_tokens": 64}}, "leaves no room"),
        ({"sampling": {"max_tokens": 63}}, "no prompt fits"),
        ({"styles": ["textbok"]}, "did you mean 'textbook'"),
        ({"prompting": "completion"}, "has no 'completion'"),
        ({"rollout": {"count": 9}}, "9 workers need 9 CPU, the cluster has 2"),
    ],
)
def test_mistakes_are_named(
    ray_cluster: None, tiny_model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        perform(make_recipe(tmp_path / "run", **({"model": tiny_model} | changes)))
