"""The pipeline under real Ray."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray.data
from rich.console import Console

from raylign.config import PrepareConfig, SourceConfig, TextbookConfig, UserError
from raylign.data.corpus.features import measure_documents, sign_documents
from raylign.data.corpus.funnel import STEPS
from raylign.data.corpus.ingest import read_documents
from raylign.data.corpus.pipeline import Inputs, build_corpus, list_files
from raylign.data.decontamination.index import build_index, list_needles, overlapping
from raylign.data.sources.slices import plan_slices
from raylign.data.textbook.arithmetic import hold_out
from raylign.tracking import ProgressBoard

TEXTBOOK = TextbookConfig(pages=1300, max_digits=2, exercises=60, prompts=40, held_out=30)
PROSE = (
    "The harbour of the old town lies open to the {0} wind, and every {0} evening the boats come "
    "home with nets that smell of salt and {0} weed.\nChildren wait on the wall and count the "
    "sails. Number {0} is always last.\n"
)
NUMBERS = ("north", "south", "east", "west", "cold", "warm", "early", "late", "quiet", "loud")


@pytest.fixture
def board() -> ProgressBoard:
    return ProgressBoard(Console(file=io.StringIO()))


def write_web(directory: Path) -> Path:
    """Sixty documents in four files, with every flaw the pipeline knows."""
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(3000)]
    prose = [" ".join(rng.choice(words, 90)) for _ in range(40)]
    near = [text.replace(text.split()[40], "changed", 1) for text in prose[:4]]
    problem = hold_out(TEXTBOOK.held_out, 0, TEXTBOOK.max_digits)[0]
    leak = f"{prose[20]}\nEveryone knows: {problem.a} {problem.op} {problem.b} = {problem.answer}."
    texts: list[Any] = [
        *prose,
        *near,
        prose[5].upper() + "  ",
        "too short",
        "!?" * 60,
        leak,
        f"{problem.a} {problem.op} {problem.b} is the whole of this document, which goes"
        + " x" * 20,
        "  \n ",
        17,
    ]
    directory.mkdir()
    for part in range(4):
        rows = [json.dumps({"text": text}) for text in texts[part::4]]
        (directory / f"part-{part}.jsonl").write_text("\n".join([*rows, "{broken", ""]))
    return directory


def configure(web: Path) -> PrepareConfig:
    return PrepareConfig(
        sources=(
            SourceConfig(kind="jsonl", path=web),
            SourceConfig(kind="textbook"),
        ),
        textbook=TEXTBOOK,
        english_held_out_share=0.1,
    )


def build(config: PrepareConfig, directory: Path, board: ProgressBoard, seed: int = 0) -> Path:
    """Every pass, as `jobs.prepare` composes them; the corpus is in `directory / "corpus"`."""
    folders = {n: directory / n for n in ("documents", "signals", "signatures", "corpus")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    slices = plan_slices(config.sources, config.textbook)
    reading = read_documents(slices, config, seed, folders["documents"], board)
    names = [f"part-{number:06d}" for number in range(len(reading))]
    files = list_files(
        folders["documents"],
        reading,
        signals=[str(folders["signals"] / f"{name}.parquet") for name in names],
        kind=[part.kind for part in slices],
        quality=[None] * len(slices),
    )
    measure_documents(files, config.signals, folders["signals"], board)
    sign_documents(files, config.dedup, folders["signatures"], board)
    stems = tuple(str(folders["signatures"] / f"part-{row['number']:06d}") for row in files)
    inputs = Inputs(files=files, stems=stems, reading=tuple(reading))
    build_corpus(inputs, config, seed, folders["corpus"], board)
    return folders["corpus"]


def read(directory: Path) -> list[dict[str, Any]]:
    return [
        row
        for file in sorted(directory.glob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def hash_files(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and not file.relative_to(directory).parts[0].startswith(".")
    }


@pytest.fixture(scope="module")
def built(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("corpus")
    board = ProgressBoard(Console(file=io.StringIO()))
    yield build(configure(write_web(root / "web")), root / "built", board)


def test_nothing_is_lost(built: Path) -> None:
    documents, excluded = read(built / "documents"), read(built / "excluded")
    held = read_lines(built / "english_held_out.jsonl")
    rejected = read(built.parent / "documents" / "rejected")
    everything = len(documents) + len(excluded) + len(held) + len(rejected)
    assert everything == 51 + 4 + TEXTBOOK.pages
    assert len({row["doc_id"] for row in documents + excluded}) == len(documents) + len(excluded)
    funnel = json.loads((built / "funnel.json").read_text())
    steps = {step["name"]: step for step in funnel["steps"]}
    assert tuple(steps) == STEPS
    assert steps["read"]["in"] == 51 + 4 + TEXTBOOK.pages
    for before, after in zip(funnel["steps"], funnel["steps"][1:], strict=False):
        assert before["out"] == after["in"]
    assert steps["decontaminate"]["out"] == len(documents)
    assert steps["read"]["dropped"] == {"empty": 1, "invalid_json": 4, "not_text": 1}
    assert Counter(row["reason"] for row in rejected) == steps["read"]["dropped"]
    assert all(row["origin"] and row["offset"] is not None for row in rejected)
    assert steps["quality"]["dropped"] == {"few_letters": 1, "long_words": 1, "too_short": 1}
    assert steps["quality"]["in"] - steps["quality"]["out"] == 2  # one of them for two reasons
    assert steps["exact_duplicates"]["dropped"] == {"exact_duplicate": 1}
    read_of = {"web": 55, "textbook": TEXTBOOK.pages}
    for source, counts in funnel["sources"].items():
        own = [row for row in documents if row["source"] == source]
        chars = sum(len(row["text"]) for row in own)
        assert counts == {"documents": len(own), "chars": chars, "read": read_of[source]}
    assert sum(found["documents"] for found in funnel["languages"].values()) == len(documents)
    assert sum(funnel["lengths"][""].values()) == len(documents)
    assert funnel["duplicates"]["clusters"] == {"2": 6}
    assert set(funnel["examples"]) >= {
        "kept",
        "too_short",
        "near_duplicate",
        "held_out_line",
    }
    assert all(len(e["text"]) <= 400 for shown in funnel["examples"].values() for e in shown)


def test_excluded_documents_keep_text_reasons_and_partner(built: Path) -> None:
    documents = {row["doc_id"]: row for row in read(built / "documents")}
    excluded = read(built / "excluded")
    held = {row["text"] for row in read_lines(built / "english_held_out.jsonl")}
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for row in excluded:
        by_stage.setdefault(row["stage"], []).append(row)
        assert row["reasons"]
    found = read(built.parent / "documents" / "rejected")
    assert sorted(row["excerpt"].strip() for row in found) == ["", "17", *["{broken"] * 4]
    (marks,) = (row for row in by_stage["quality"] if row["text"].startswith("!?"))
    assert marks["reasons"] == ["few_letters", "long_words"]
    (copy,) = by_stage["exact_duplicates"]
    assert copy["similarity"] == 1.0
    near = by_stage["near_duplicates"]
    # Four edited copies, and the document that repeats another before its leak.
    assert len(near) == 5
    for row in near:
        assert 0.7 <= row["similarity"] <= 1.0
        stays = (
            [documents[row["duplicate_of"]]["text"]] if row["duplicate_of"] in documents else held
        )
        words = set(row["text"].split())
        assert max(len(words & set(text.split())) for text in stays) > 0.8 * len(words)
    whole = [row for row in by_stage["decontaminate"] if row["source"] == "web"]
    assert all(row["reasons"] == ["held_out"] for row in whole)


def test_held_out_problems_occur_nowhere(built: Path) -> None:
    held = read_lines(built / "held_out.jsonl")
    problems = hold_out(TEXTBOOK.held_out, 0, TEXTBOOK.max_digits)
    assert [row["key"] for row in held] == [problem.key for problem in problems]
    assert [row["reference"] for row in held] == [str(problem.answer) for problem in problems]
    index = build_index(list_needles(problems), 13)
    assert overlapping([row["prompt"] for row in held], index) == list(range(len(held)))
    assert overlapping([row["text"] for row in read(built / "documents")], index) == []
    exercises, prompts = read_lines(built / "exercises.jsonl"), read_lines(built / "prompts.jsonl")
    assert (len(exercises), len(prompts)) == (60, 40)
    keys = {row["key"] for row in held}
    assert not keys & {row["key"] for row in exercises + prompts}
    for row in exercises:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    assert len({row["id"] for row in prompts + held}) == len(prompts) + len(held)
    counts = json.loads((built / "funnel.json").read_text())["decontamination"]
    assert counts["overlap_after"] == 0 and counts["held_out"] == 30
    assert counts["items"] == {"held_out": 30 + counts["english_held_out"]}
    assert counts["lines_removed"] >= counts["documents_shortened"] > 0


def test_held_out_english_is_not_trained_on(built: Path) -> None:
    held = [row["text"] for row in read_lines(built / "english_held_out.jsonl")]
    documents = [row["text"] for row in read(built / "documents")]
    assert 3 <= len(held) <= 5
    assert all("word" in text for text in held)
    assert overlapping(documents, build_index(held, 13)) == []


def test_equal_bytes_at_any_parallelism(
    built: Path, tmp_path: Path, board: ProgressBoard, ray_cluster: None
) -> None:
    context = ray.data.DataContext.get_current()
    limits, size = context.execution_options.resource_limits, context.target_max_block_size
    try:
        context.execution_options.resource_limits = limits.copy(cpu=1)
        context.target_max_block_size = 1 << 16  # blocks of a hundred documents
        again = build(configure(built.parents[1] / "web"), tmp_path / "again", board)
    finally:
        context.execution_options.resource_limits, context.target_max_block_size = limits, size
    assert hash_files(again) == hash_files(built)


def test_another_seed_is_another_corpus(tmp_path: Path, built: Path, board: ProgressBoard) -> None:
    config = configure(built.parents[1] / "web")
    other = build(config, tmp_path / "other", board, seed=1)
    assert read_lines(other / "held_out.jsonl") != read_lines(built / "held_out.jsonl")
    assert read_lines(other / "english_held_out.jsonl") != read_lines(
        built / "english_held_out.jsonl"
    )


def test_document_granularity_and_limit(tmp_path: Path, built: Path, board: ProgressBoard) -> None:
    config = configure(built.parents[1] / "web")
    sources = tuple(s.model_copy(update={"limit": 20}) for s in config.sources)
    strict = config.decontaminate.model_copy(update={"granularity": "document"})
    config = config.model_copy(update={"sources": sources, "decontaminate": strict})
    funnel = json.loads((build(config, tmp_path / "x", board) / "funnel.json").read_text())
    first = funnel["steps"][0]
    assert first["out"] == 40  # twenty of each source; two files of the first are not used
    assert first["dropped"]["invalid_json"] == 2
    counts = funnel["decontamination"]
    assert counts["documents_removed"] > 0 and not funnel["removed"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"min_chars": 5000},
            "'too_short' in step 'quality'; relax prepare.quality.min_chars=5000",
        ),
        ({"max_mean_word_chars": 0.5}, "'long_words' in step 'quality'; relax"),
    ],
)
def test_an_empty_corpus_names_the_cause(
    tmp_path: Path, built: Path, board: ProgressBoard, changes: dict[str, Any], message: str
) -> None:
    config = configure(built.parents[1] / "web")
    config = config.model_copy(
        update={
            "quality": config.quality.model_copy(update=changes),
            "textbook": TEXTBOOK.model_copy(update={"pages": 10}),
        }
    )
    with pytest.raises(UserError, match=message):
        build(config, tmp_path / "x", board)


def test_no_documents_at_all(tmp_path: Path, ray_cluster: None, board: ProgressBoard) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    config = PrepareConfig(
        sources=(SourceConfig(kind="jsonl", path=tmp_path / "empty.jsonl"),), textbook=TEXTBOOK
    )
    with pytest.raises(UserError, match="no documents were found in any source"):
        build(config, tmp_path / "x", board)


def test_too_many_held_out_problems(tmp_path: Path, board: ProgressBoard) -> None:
    textbook = TextbookConfig(pages=5, max_digits=1, held_out=500)
    config = PrepareConfig(sources=(SourceConfig(kind="textbook"),), textbook=textbook)
    with pytest.raises(UserError, match=r"prepare\.textbook\.held_out=500: cannot hold out"):
        build(config, tmp_path / "x", board)


def test_nobody_goes_for_a_document_that_goes_itself(
    tmp_path: Path, ray_cluster: None, board: ProgressBoard
) -> None:
    """The longest of two near copies holds an evaluation item: the other one stays."""
    body = " ".join(f"word{number}" for number in range(120))
    question = "How many boats lie in the harbour when the last of the twelve sails has come home"
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in (f"{body} {question}?", body, PROSE))
    )
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"question": question}) + "\n")
    config = PrepareConfig.model_validate(
        {
            "sources": [{"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}],
            "english_held_out_share": 0.0,
            "decontaminate": {
                "granularity": "document",
                "max_occurrences": 5,
                "against": [
                    {
                        "task": "quiz",
                        "path": str(tmp_path / "quiz.jsonl"),
                        "columns": ["question"],
                    }
                ],
            },
        }
    )
    corpus = build(config, tmp_path / "x", board)
    assert [row["text"][:8] for row in read(corpus / "documents")] == [body[:8], PROSE[:8]]
    (gone,) = read(corpus / "excluded")
    assert (gone["stage"], gone["reasons"]) == ("decontaminate", ["quiz"])
    (hit,) = json.loads(gone["details"])["evaluation_items"]
    assert (hit["task"], hit["item_coverage"]) == ("quiz", 1.0) and question in hit["excerpt"]
    funnel = json.loads((corpus / "funnel.json").read_text())
    assert funnel["decontamination"]["tasks"]["quiz"]["documents"] == 1
    assert funnel["duplicates"]["orphaned"] == 0
    assert not (corpus / "exercises.jsonl").exists()
