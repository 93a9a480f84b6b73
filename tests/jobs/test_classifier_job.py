"""Fitting from labels, and the judge on a real vLLM engine: a random one, which cannot judge."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs.classifier import Annotation, Asked, check, read_labels, write_annotations
from jobs.classifier import run as classify
from raylign.config import Recipe, UserError
from raylign.config.synthesis import JudgeConfig
from raylign.data.quality.classifier import load
from raylign.data.synthesis.answers import Answer, AnswerCache
from raylign.run import Run, content_hash
from raylign.tracking import ProgressBoard, read_lines

pytestmark = pytest.mark.slow


def perform(root: Path, **classifier: Any) -> str:
    recipe = Recipe.model_validate({"run": root, "seed": 3, "classifier": classifier})
    console = Console(file=io.StringIO(), width=200)
    with ProgressBoard(console) as board:
        classify(recipe, Run(root), board)
    return console.file.getvalue()  # type: ignore[attr-defined]


def write_labels(file: Path, count: int = 200) -> Path:
    """Texts whose label is how often they say "good"."""
    rows = [
        {"text": " ".join(["good"] * (n % 6) + ["bad"] * (5 - n % 6)) + f" x{n}", "score": n % 6}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_labels_become_a_stage_that_loads(ray_cluster: None, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels.jsonl")
    said = perform(tmp_path / "run", labels=labels, fit={"bits": 12, "ridge": 0.01})
    stage = Run(tmp_path / "run").find("classifier")
    assert stage is not None and "held-out labels: pearson" in said
    assert stage.manifest.parents == {"labels": content_hash(labels)}
    assert stage.manifest.summary["pearson"] > 0.9
    metrics = json.loads((stage.path / "metrics.json").read_text())
    assert metrics["labels"] == {"fitted": 160, "calibrated": 20, "held_out": 20}
    bad, good = load(stage.path).score(["bad bad bad bad bad", "good good good good good"])
    assert bad < 1.5 and good > 3.5


def test_labels_are_read_from_either_format(tmp_path: Path) -> None:
    write_labels(tmp_path / "a.jsonl", 3)
    pq.write_table(pa.table({"text": ["p", "q"], "score": [1.5, 2.0]}), tmp_path / "b.parquet")
    texts, scores = read_labels(tmp_path, "text", "score")
    assert texts.to_pylist()[3:] == ["p", "q"] and scores == [0, 1, 2, 1.5, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"}', "2: needs 'text'"),
        ('{"text": "x", "score": "3"}', "2: needs"),
        ('{"text": "x", "score": true}', "2: needs"),
        ('{"text": 5, "score": 3}', "2: needs"),
        ("[1]", "2: needs"),
        ("{", "2: not valid JSON"),
    ],
)
def test_a_bad_label_is_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "l.jsonl"
    file.write_text('{"text": "x", "score": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_labels(file, "text", "score")


def test_a_judge_and_labels_exclude_each_other(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"either classifier.labels.*or classifier.judge"):
        perform(tmp_path / "run")


def test_asking_greedily_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every attempt gives the same answer"):
        check(JudgeConfig.model_validate({"model": "m", "sampling": {"temperature": 0}}))
    check(JudgeConfig.model_validate({"model": "m", "sampling": {"temperature": 0}, "attempts": 1}))


def test_unreadable_answers_are_asked_again_counted_and_left_out(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    # The same model with room for the question.
    model = tmp_path / "judge"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    (tmp_path / "rubric.txt").write_text("Add points.")
    texts = [f"w{n % 50} w{n // 50} w2" for n in range(60)] + [" ".join(["w1"] * 500)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "documents.parquet")
    judge = {
        "model": model,
        "documents": tmp_path,
        "rubric": tmp_path / "rubric.txt",
        "attempts": 2,
        "sampling": {"max_tokens": 8},
        "rollout": {"max_sequences": 32, "kv_cache_mb": 32, "cpus": 0.5},
    }
    message = r"0 of 61 judged documents .*\(60 unparsable, 1 too long to ask\), and 50 are needed"
    with pytest.raises(UserError, match=message):
        perform(tmp_path / "run", judge=judge)
    with AnswerCache(tmp_path / "run/.classifier.cache") as cache:
        assert len(cache) == 120  # sixty documents, twice

    # What a judge that can judge would have said, but for a few of the answers. Nothing is asked
    # again, and no worker starts: the cluster has no room for one.
    [answers] = (tmp_path / "run/.classifier.cache").glob("*.jsonl")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    lines = [
        json.dumps(row | {"text": f"Because.\nScore: {n % 6}"} if n % 20 else row)
        for n, row in enumerate(rows)
    ]
    answers.write_text("".join(line + "\n" for line in lines))
    no_room = judge | {"rollout": {"count": 99, "cpus": 99.0}}
    perform(tmp_path / "run", judge=no_room, fit={"bits": 10})
    stage = Run(tmp_path / "run").find("classifier")
    assert stage is not None
    annotations = read_lines(stage.path / "annotations.jsonl")
    scores = [row["score"] for row in annotations]
    unread = scores.count(None) - 1
    assert len(scores) == 61 and unread <= 3  # a second answer may have helped
    summary = stage.manifest.summary
    assert (summary["judged"], summary["unparsable"], summary["prompt_too_long"]) == (61, unread, 1)
    assert sum(load(stage.path).metrics["labels"].values()) == 60 - unread
    assert {row["attempts"] for row in annotations} == {1, 2}
    assert set(stage.manifest.parents) == {"documents", "judge", "rubric"}


def test_annotations_keep_what_was_asked_and_answered(tmp_path: Path) -> None:
    asked = Asked("d", "passage", "question?")
    rows = [
        Annotation(asked, Answer("Score: 4", "stop", 3, 0), 4, 1),
        Annotation(asked, Answer("hm", "length", 3, 0), None, 3),
    ]
    write_annotations(tmp_path / "a.jsonl", rows, "hash")
    good, bad = read_lines(tmp_path / "a.jsonl")
    assert good == {
        "doc_id": "d",
        "text": "passage",
        "prompt": "question?",
        "answer": "Score: 4",
        "finish_reason": "stop",
        "score": 4,
        "attempts": 1,
        "model_hash": "hash",
    }
    assert bad["score"] is None and bad["attempts"] == 3
