"""`python -m jobs.prepare` on corpora: thresholds, resume, yesterday's corpus, real web pages."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from jobs import prepare
from jobs.entry import open_run
from raylign.config import Recipe
from raylign.run import Run
from raylign.tracking import ProgressBoard

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT.parent / "shared" / "data" / "web"
SYLLABLES = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "ol")]
STAGES = ("documents", "signals", "signatures", "corpus")


def make(directory: Path, sources: list[dict[str, Any]], **changes: Any) -> Recipe:
    prepared = {"sources": sources, "english_held_out_share": 0.0} | changes.pop("prepare", {})
    body = {"run": directory, "ray": {"num_cpus": 2}, "prepare": prepared} | changes
    return Recipe.model_validate(body)


def go(recipe: Recipe) -> tuple[Run, str]:
    """The stages up to the corpus."""
    out = io.StringIO()
    run = open_run(recipe)
    prepare.build_corpus(recipe, run, ProgressBoard(Console(file=out, width=200)))
    return run, out.getvalue()


def read(directory: Path) -> list[dict[str, Any]]:
    files = sorted(directory.glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def contents(run: Run) -> dict[str, str]:
    return {name: run.require(name, "prepare").manifest.content for name in STAGES}


def write_texts(file: Path, seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randrange(2, 5))) for _ in range(3000)]
    texts = [
        " ".join(["the", "of", *rng.choices(words, k=size)])
        for size in (rng.randrange(60, 160) for _ in range(count))
    ]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def test_a_changed_threshold_measures_nothing_again(ray_cluster: None, tmp_path: Path) -> None:
    write_texts(tmp_path / "rows.jsonl", 0, 60)
    sources = [{"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}]
    run, _ = go(make(tmp_path / "run", sources))
    before = contents(run)
    stamps = {n: (run.root / n / "manifest.json").stat().st_mtime_ns for n in STAGES}
    stricter = {
        "quality": {
            "min_chars": 700,
            "gopher": {"min_words": 100},
            "fineweb": {"min_punctuated_line_share": None},
        }
    }
    run, said = go(make(tmp_path / "run", sources, prepare=stricter, redo="corpus"))
    assert said.count("already done") == 3 and "measure" not in said and "sign" not in said.split()
    for name in ("documents", "signals", "signatures"):
        assert (run.root / name / "manifest.json").stat().st_mtime_ns == stamps[name]
    assert contents(run)["corpus"] != before["corpus"]
    excluded = read(run.root / "corpus" / "excluded")
    assert len(excluded) + len(read(run.root / "corpus" / "documents")) == 60
    short = [row for row in excluded if len(row["text"]) < 700]
    # All reasons are kept, not the first alone.
    assert short and all("too_short" in row["reasons"] for row in short)
    assert any({"gopher_few_words"} < set(row["reasons"]) for row in short)


def test_todays_crawl_against_yesterdays_corpus(ray_cluster: None, tmp_path: Path) -> None:
    old = write_texts(tmp_path / "old.jsonl", 1, 50)
    fresh = write_texts(tmp_path / "new.jsonl", 2, 20)
    again = [old[3].upper(), old[9].replace(old[9].split()[30], "changed", 1)]
    with (tmp_path / "new.jsonl").open("a") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in again)
    yesterday, _ = go(
        make(tmp_path / "old", [{"kind": "jsonl", "path": str(tmp_path / "old.jsonl")}])
    )
    sources = [{"kind": "jsonl", "path": str(tmp_path / "new.jsonl")}]
    against = {"dedup": {"against": [str(yesterday.root)]}}
    today, said = go(make(tmp_path / "new", sources, prepare=against))
    assert len(read(today.root / "corpus" / "documents")) == len(fresh)
    ids = {row["text"]: row["doc_id"] for row in read(yesterday.root / "corpus" / "documents")}
    excluded = read(today.root / "corpus" / "excluded")
    assert [row["duplicate_of"] for row in excluded] == [ids[old[3]], ids[old[9]]]
    assert [row["stage"] for row in excluded] == ["exact_duplicates", "near_duplicates"]
    assert "22/22" not in said  # only today's documents were signed
    manifest = today.require("corpus", "prepare").manifest
    assert manifest.parents[str(yesterday.root)] == contents(yesterday)["corpus"]
    # The day after, both are compared with.
    both = {"dedup": {"against": [str(yesterday.root), str(today.root)]}}
    (tmp_path / "third.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in (fresh[0], old[0], "One more line. " * 9))
    )
    third = [{"kind": "jsonl", "path": str(tmp_path / "third.jsonl")}]
    tomorrow, _ = go(make(tmp_path / "third", third, prepare=both))
    assert len(read(tomorrow.root / "corpus" / "documents")) == 1
    assert all(len(row["duplicate_of"]) == 32 for row in read(tomorrow.root / "corpus/excluded"))


def test_lines_and_passages_that_others_hold_are_cut(ray_cluster: None, tmp_path: Path) -> None:
    rng = random.Random(4)

    def draw(count: int) -> str:
        return " ".join(f"word{rng.randrange(5000)}" for _ in range(count))

    footer = "Copyright 2020 by the publishers of this site, all rights reserved."
    passage = draw(70)
    texts = [f"{draw(90)}\n{footer}" for _ in range(8)]
    texts += [f"{draw(120)} {passage} {draw(100)}", f"{draw(150)}\n{passage}\n{draw(80)}"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    dedup = {"keep": "first", "lines": {}, "substring": {"words": 50}}
    run, _ = go(
        make(
            tmp_path / "run",
            [{"kind": "jsonl", "path": str(file)}],
            prepare={"dedup": dedup},
        )
    )
    kept = [row["text"] for row in read(run.root / "corpus" / "documents")]
    assert len(kept) == 10
    assert kept[0] == texts[0] and [footer in text for text in kept] == [True] + [False] * 9
    assert kept[1] == texts[1].replace("\n" + footer, "")
    assert passage in kept[8] and passage.split()[5] in kept[8]
    assert kept[9] == texts[9].replace(passage, "").strip()
    funnel = json.loads((run.root / "corpus" / "funnel.json").read_text())
    assert funnel["removed"]["repeated_passages"] == 8
    assert funnel["examples"]["repeated_passage"]


@pytest.mark.slow
def test_killed_twice_the_corpus_is_the_same(ray_cluster: None, tmp_path: Path) -> None:
    """SIGKILL of the driver and of all its processes, in two stages, and a last run."""
    directory = tmp_path / "rows"
    directory.mkdir()
    for part in range(8):
        write_texts(directory / f"part-{part}.jsonl", part, 120)
    recipe: dict[str, Any] = {
        "ray": {"num_cpus": 2},
        "prepare": {
            "sources": [{"kind": "jsonl", "path": str(directory)}],
            "sequence_length": 64,
            "shard_rows": 64,
        },
        "tokenizer": {"vocab_size": 300},
    }
    body = recipe | {"run": str(tmp_path / "killed")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(body))
    command = [sys.executable, "-m", "jobs.prepare", str(tmp_path / "recipe.yaml")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
    finished: dict[str, int] = {}
    for stage in ("documents", "corpus"):
        process = subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.DEVNULL)
        _wait_for_progress(process, tmp_path / "killed", stage)
        _kill_tree(process)
        if stage == "documents":
            finished = _list_finished(tmp_path / "killed" / ".documents.partial")
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed = Run(tmp_path / "killed")
    assert not list(killed.root.glob(".*.partial"))
    # What was finished at the first kill was not written again.
    assert finished
    for name, stamp in finished.items():
        assert (killed.root / "documents" / name).stat().st_mtime_ns == stamp
    whole = open_run(Recipe.model_validate(recipe | {"run": tmp_path / "whole"}))
    prepare.run(
        Recipe.model_validate(recipe | {"run": tmp_path / "whole"}),
        whole,
        ProgressBoard(Console(file=io.StringIO())),
    )
    for name in (*STAGES, "tokenizer", "shards"):
        here, there = (run.require(name, "").manifest.content for run in (killed, whole))
        assert here == there, name


def _list_finished(partial: Path) -> dict[str, int]:
    """Files of finished parts, and when they were written."""
    reports = [json.loads(file.read_text()) for file in (partial / ".done").glob("*.json")]
    names = [name for report in reports for name in report["files"]]
    return {name: (partial / name).stat().st_mtime_ns for name in names}


def _wait_for_progress(process: subprocess.Popen[Any], run: Path, stage: str) -> None:
    """Until the stage has finished a few parts."""
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        parts = list((run / f".{stage}.partial" / ".done").glob("*.json"))
        if len(parts) >= 2 or (run / stage).exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{stage} made no progress; exit status {process.poll()}")


def _kill_tree(process: subprocess.Popen[Any]) -> None:
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        if member.is_running():
            member.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.skipif(not WEB.is_dir(), reason="needs ../shared/data/web")
def test_real_pages_through_everything(ray_cluster: None, tmp_path: Path) -> None:
    """C4 and Wikipedia samples and the WARC files, good and broken."""
    sources = [
        {"kind": "jsonl", "path": str(WEB / "c4_demo.jsonl"), "preset": "c4", "domain": "web"},
        # Articles of one line each do not end lines as web pages do: rules of their own.
        {"kind": "text", "path": str(WEB / "wiki_demo.txt"), "domain": "wiki", "quality": {}},
        {"kind": "warc", "path": str(WEB / "warc"), "domain": "archive"},
    ]
    rules = {
        "quality": {"gopher": {}, "repetition": {}, "c4": {}, "fineweb": {}},
        "pii": {"mails": True},
        "dedup": {"lines": {}, "substring": {}},
        "max_damaged_share": 0.9,
    }
    run, _ = go(make(tmp_path / "run", sources, prepare=rules))
    documents, excluded = (read(run.root / "corpus" / n) for n in ("documents", "excluded"))
    assert {row["domain"] for row in documents} >= {"web", "wiki"}
    assert 100 < len(documents) < 1500
    assert not any(row["text"] != row["text"].strip("\n") for row in documents)
    assert all(row["stage"] and row["reasons"] for row in excluded)
    rejected = read(run.root / "documents" / "rejected")
    assert all(row["reason"] and row["origin"] for row in rejected)
    archive = [row for row in rejected if "warc" in row["origin"]]
    assert archive
    funnel = json.loads((run.root / "corpus" / "funnel.json").read_text())
    assert max(funnel["languages"], key=lambda k: funnel["languages"][k]["documents"]) == "en"
    assert {"gopher", "c4", "fineweb"} & {
        reason.split("_")[0] for reason in funnel["steps"][1]["dropped"]
    }


def test_check_looks_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "A good line of text."}\n{broken\n{"body": 1}\n')
    recipe = {
        "run": str(tmp_path / "run"),
        "prepare": {"sources": [{"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
    command = [sys.executable, "-m", "jobs.prepare", str(tmp_path / "recipe.yaml"), "--check"]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for expected in ("rows.jsonl", "A good line of text.", "invalid_json", "prepare.sources.0"):
        assert expected in done.stdout
    assert not (tmp_path / "run").exists()
