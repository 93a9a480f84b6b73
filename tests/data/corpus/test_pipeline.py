"""The pipeline under real Ray."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray.data
from rich.console import Console

from raylign.config import PrepareConfig, SourceConfig, TextbookConfig, UserError
from raylign.data.corpus import passes
from raylign.data.corpus.pipeline import build_corpus, decide_fates
from raylign.data.decontamination.index import build_index, list_needles, overlapping
from raylign.data.documents import list_document_files, shuffle_key
from raylign.data.packing import PackedShards
from raylign.data.shards.pack import Vocabulary, pack_corpus
from raylign.data.sources.slices import plan_slices
from raylign.data.textbook.arithmetic import hold_out
from raylign.tokenization.train import train_bpe
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
    directory.mkdir()
    slices = plan_slices(config.sources, config.textbook)
    build_corpus(slices, config, seed, directory, board)
    return directory


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
        if file.is_file()
    }


@pytest.fixture(scope="module")
def built(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("corpus")
    board = ProgressBoard(Console(file=io.StringIO()))
    yield build(configure(write_web(root / "web")), root / "built", board)


def test_nothing_is_lost(built: Path) -> None:
    documents, excluded = read(built / "documents"), read(built / "excluded")
    held = read_lines(built / "english_held_out.jsonl")
    assert len(documents) + len(excluded) + len(held) == 51 + 4 + TEXTBOOK.pages
    assert len({row["doc_id"] for row in documents + excluded}) == len(documents) + len(excluded)
    funnel = json.loads((built / "funnel.json").read_text())
    steps = {step["name"]: step for step in funnel["steps"]}
    assert tuple(steps) == passes_steps()
    assert steps["read"]["in"] == 51 + 4 + TEXTBOOK.pages
    for before, after in zip(funnel["steps"], funnel["steps"][1:], strict=False):
        assert before["out"] == after["in"]
    assert steps["decontaminate"]["out"] == len(documents)
    assert steps["read"]["dropped"] == {"invalid_json": 4, "not_text": 1}
    assert steps["clean"]["dropped"] == {"empty": 1}
    assert steps["quality"]["dropped"] == {"few_letters": 1, "long_words": 1, "too_short": 1}
    assert steps["quality"]["in"] - steps["quality"]["out"] == 2  # one of them for two reasons
    assert steps["exact_duplicates"]["dropped"] == {"exact_duplicate": 1}
    for source, counts in funnel["sources"].items():
        own = [row for row in documents if row["source"] == source]
        assert counts == {"documents": len(own), "chars": sum(len(row["text"]) for row in own)}
    assert set(funnel["examples"]) >= {
        "invalid_json",
        "too_short",
        "near_duplicate",
        "held_out_line",
    }
    assert all(len(e["text"]) <= 300 for shown in funnel["examples"].values() for e in shown)


def passes_steps() -> tuple[str, ...]:
    from raylign.data.corpus.funnel import STEPS

    return STEPS


def test_excluded_documents_keep_text_reasons_and_partner(built: Path) -> None:
    documents = {row["doc_id"]: row for row in read(built / "documents")}
    excluded = read(built / "excluded")
    held = {row["text"] for row in read_lines(built / "english_held_out.jsonl")}
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for row in excluded:
        by_stage.setdefault(row["stage"], []).append(row)
        assert row["reasons"]
    assert sorted(row["text"] for row in by_stage["read"]) == ["17", *["{broken\n"] * 4]
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
        again = build(configure(built.parent / "web"), tmp_path / "again", board)
    finally:
        context.execution_options.resource_limits, context.target_max_block_size = limits, size
    assert hash_files(again) == hash_files(built)


def test_another_seed_is_another_corpus(tmp_path: Path, built: Path, board: ProgressBoard) -> None:
    config = configure(built.parent / "web")
    other = build(config, tmp_path / "other", board, seed=1)
    assert read_lines(other / "held_out.jsonl") != read_lines(built / "held_out.jsonl")
    assert read_lines(other / "english_held_out.jsonl") != read_lines(
        built / "english_held_out.jsonl"
    )


def test_document_granularity_and_limit(tmp_path: Path, built: Path, board: ProgressBoard) -> None:
    config = configure(built.parent / "web")
    sources = tuple(s.model_copy(update={"limit": 20}) for s in config.sources)
    strict = config.decontaminate.model_copy(update={"granularity": "document"})
    config = config.model_copy(update={"sources": sources, "decontaminate": strict})
    funnel = json.loads((build(config, tmp_path / "x", board) / "funnel.json").read_text())
    first = funnel["steps"][0]
    assert first["out"] == 40 and first["in"] == 41  # one broken line among the first twenty
    counts = funnel["decontamination"]
    assert counts["documents_removed"] > 0 and counts["lines_removed"] == 0


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
    config = configure(built.parent / "web")
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


@pytest.fixture(scope="module")
def vocabulary(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [row["text"] for row in read(built / "documents")]
    train_bpe(texts, 400).save_pretrained(directory)
    return Vocabulary(directory, "hash", 400, eos=1, pad=0)


def shards(
    built: Path, vocabulary: Vocabulary, directory: Path, board: ProgressBoard, share: float = 0.1
) -> dict:
    directory.mkdir()
    files = list_document_files(built, "prepare")
    return pack_corpus(files, vocabulary, 64, 50, share, 0, directory, board)


def test_shards_hold_every_document_once(
    built: Path, vocabulary: Vocabulary, tmp_path: Path, board: ProgressBoard
) -> None:
    from tokenizers import Tokenizer

    summary = shards(built, vocabulary, tmp_path / "shards", board)
    documents = sorted(read(built / "documents"), key=lambda row: shuffle_key(row["doc_id"], 0))
    decoder = Tokenizer.from_file(str(vocabulary.directory / "tokenizer.json"))
    found: dict[str, list[str]] = {}
    for split in ("train", "validation"):
        packed = PackedShards(tmp_path / "shards", split)
        tokens, segments = packed.read(range(packed.rows))
        flat = tokens.reshape(-1)[segments.reshape(-1) > 0]
        ends = np.flatnonzero(flat == vocabulary.eos)
        pieces = np.split(flat, ends + 1)[:-1]
        found[split] = [decoder.decode(piece[:-1].tolist()) for piece in pieces]
        assert packed.rows == summary[f"{split}_rows"] and len(flat) == packed.tokens
    assert found["validation"] + found["train"] == [row["text"] for row in documents]
    share = summary["validation_tokens"] / (summary["validation_tokens"] + summary["train_tokens"])
    assert 0.1 <= share < 0.11
    assert not (tmp_path / "shards" / "work").exists()
    assert 1.5 < summary["bytes_per_token"] < 5


def test_shards_are_equal_bytes(
    built: Path, vocabulary: Vocabulary, tmp_path: Path, board: ProgressBoard
) -> None:
    shards(built, vocabulary, tmp_path / "a", board)
    context = ray.data.DataContext.get_current()
    limits = context.execution_options.resource_limits
    try:
        context.execution_options.resource_limits = limits.copy(cpu=1)
        shards(built, vocabulary, tmp_path / "b", board)
    finally:
        context.execution_options.resource_limits = limits
    assert hash_files(tmp_path / "a") == hash_files(tmp_path / "b")


def test_no_validation_and_too_few_documents(
    built: Path, vocabulary: Vocabulary, tmp_path: Path, board: ProgressBoard
) -> None:
    assert shards(built, vocabulary, tmp_path / "a", board, share=0.0)["validation_rows"] == 0
    with pytest.raises(UserError, match=r"prepare\.validation_share=1\.0"):
        shards(built, vocabulary, tmp_path / "b", board, share=1.0)
    slow = Vocabulary(tmp_path, "hash", 400, eos=1, pad=0)
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        shards(built, slow, tmp_path / "c", board)


def test_text_that_spells_the_end_token_is_text(
    vocabulary: Vocabulary, tmp_path: Path, ray_cluster: None, board: ProgressBoard
) -> None:
    import pyarrow as pa

    (tmp_path / "documents").mkdir()
    texts = ["one <eos> two <pad>", "three"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "documents" / "part.parquet")
    shards(tmp_path, vocabulary, tmp_path / "shards", board, share=0.0)
    tokens, _ = PackedShards(tmp_path / "shards").read([0])
    assert (tokens == vocabulary.eos).sum() == 2


def test_row_files_do_not_depend_on_how_ray_joins_and_splits_tables(tmp_path: Path) -> None:
    import dataclasses

    import pyarrow as pa

    config = PrepareConfig(textbook=TEXTBOOK)
    slices = plan_slices((SourceConfig(kind="textbook"),), TEXTBOOK)
    rows = pa.Table.from_pylist([dataclasses.asdict(part) for part in slices])
    tables = [
        passes.sign_rows(passes.judge_rows(passes.clean_rows(t), config.quality), config.dedup)
        for t in passes.read_rows(rows, TEXTBOOK, 0)
    ]
    assert len(tables) == 2
    whole = pa.concat_tables(tables)
    pieces = [whole.slice(start, 90) for start in range(0, whole.num_rows, 90)]
    found = []
    for name, arranged in (("apart", tables), ("together", [whole]), ("pieces", pieces)):
        (tmp_path / name).mkdir()
        names = [
            written
            for table in arranged
            for written in passes.write_rows(table, str(tmp_path / name))["name"].to_pylist()
        ]
        groups = passes.group_files(reversed(names))
        found.append([passes.read_files(tmp_path / name, group, ["text"]) for group in groups])
    assert [len(groups) for groups in found] == [2, 2, 2]
    assert all(a.equals(b) for groups in found[1:] for a, b in zip(found[0], groups, strict=True))
    assert hash_files(tmp_path / "apart") == hash_files(tmp_path / "together")


def test_fates_follow_the_order_of_sources(tmp_path: Path) -> None:
    """Of exact copies in two sources the first source keeps its own."""
    import dataclasses

    import pyarrow as pa

    text = PROSE.format("north")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    configs = tuple(SourceConfig(kind="jsonl", path=tmp_path / f"{n}.jsonl") for n in ("b", "a"))
    config = PrepareConfig(sources=configs, textbook=TEXTBOOK, english_held_out_share=0.0)
    slices = plan_slices(configs, TEXTBOOK)
    rows = pa.Table.from_pylist([dataclasses.asdict(part) for part in slices])
    table = pa.concat_tables(
        [passes.sign_rows(t, config.dedup) for t in passes.read_rows(rows, TEXTBOOK, 0)]
    )
    fates = decide_fates(table, slices, config, 0)
    assert fates.stages.tolist() == ["", "exact_duplicates"]
    assert fates.duplicate_of[1] == table["doc_id"][0].as_py()
