"""A run directory with every data stage, made by hand in the formats of the pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raylign.config import QualityConfig, SignalsConfig
from raylign.data.corpus.decisions import EXCLUDED
from raylign.data.corpus.funnel import Tally, describe
from raylign.data.corpus.ingest import REJECTED
from raylign.data.documents import DOCUMENTS
from raylign.data.quality.signals import measure
from raylign.data.tables import TableWriter
from raylign.run import Run, write_json

HOSTILE = """<script>alert(1)</script>"'&</pre></style> http://evil.org/ \u202e\x00 e\u0301\u0301"""
SENTENCE = "The harbour of the old town lies open to the north wind. "
PARTS = (("web", 30), ("books", 20))


def name_document(source: str, number: int) -> str:
    return f"{source}-{number:028d}"


def write_text(source: str, number: int) -> str:
    if number == 7:
        return "twice\n" * 6  # two faults
    rng = np.random.default_rng([len(source), number])
    words = " ".join(f"w{n}" for n in rng.integers(0, 500, 5 + 3 * number))
    return f"{SENTENCE * (number % 4)}{words}\n" * (1 + number % 3)


def tabulate(schema: pa.Schema, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([{n: row.get(n) for n in schema.names} for row in rows], schema)


def write_rows(file: Path, schema: pa.Schema, rows: Sequence[Mapping[str, Any]]) -> None:
    """In row groups of seven, so that readers meet several."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with TableWriter(file, schema) as writer:
        for start in range(0, len(rows), 7):
            writer.write(tabulate(schema, rows[start : start + 7]))


def describe_document(source: str, number: int) -> dict[str, Any]:
    return {
        "doc_id": name_document(source, number),
        "source": source,
        "domain": source,
        "origin": f"{source}:file@{number}",
        "text": write_text(source, number),
    }


def write_documents(run: Run) -> None:
    sources = [
        {"kind": "jsonl", "path": "/data/web.jsonl"},
        {"kind": "jsonl", "path": "/data/books.jsonl"},
    ]
    with run.write("documents", {"prepare": {"sources": sources}}, {"sources": "0" * 64}) as draft:
        reports = []
        for part, (source, size) in enumerate(PARTS):
            rows = [describe_document(source, number) for number in range(size)]
            file = f"part-{part:06d}.parquet"
            write_rows(draft.path / "documents" / file, DOCUMENTS, rows)
            gone = [
                {"source": source, "origin": f"{source}@{n}", "offset": 10 * n, "reason": reason}
                | {"excerpt": HOSTILE}
                for n, reason in enumerate(["invalid_json"] * 9 + ["empty"])
            ]
            write_rows(draft.path / "rejected" / file, REJECTED, gone)
            chars = sum(len(row["text"]) for row in rows)
            counts = {"documents": size, "used": size - part, "chars": chars, "bytes": chars}
            rejected = {"rejected": {"empty": 1, "invalid_json": 9}}
            reports.append({"source": source, **counts, **rejected})
        write_json(draft.path / "reading.json", reports)
        draft.summary["read_seconds"] = 2.0


def write_signals(run: Run) -> None:
    with run.write("signals", {}, {}) as draft:
        for part, (source, size) in enumerate(PARTS):
            texts = [write_text(source, number) for number in range(size - part)]
            table = pa.table({"text": texts, "url": pa.nulls(len(texts), pa.string())})
            signals = measure(table, SignalsConfig(language=False))
            ids = [name_document(source, number) for number in range(len(texts))]
            signals = signals.add_column(0, "doc_id", pa.array(ids))
            with TableWriter(draft.path / f"part-{part:06d}.parquet", signals.schema) as writer:
                for start in range(0, len(texts), 7):
                    writer.write(signals.slice(start, 7))


def exclude(
    source: str, number: int, stage: str, reasons: list[str], **more: Any
) -> dict[str, Any]:
    return describe_document(source, number) | {"stage": stage, "reasons": reasons} | more


def list_excluded() -> list[dict[str, Any]]:
    """Of the source "web": what went, with duplicates of documents of every fate."""
    hits = [
        {
            "task": "gsm8k",
            "item": f"test#{n}",
            "excerpt": HOSTILE,
            "item_coverage": 0.9,
            "document_coverage": 0.1,
        }
        for n in range(6)
    ]
    keepers = [("books", 1), ("web", 9), ("web", 10), ("other", 5), ("nobody", 1)]
    near = [
        exclude("web", n, "near_duplicates", ["near_duplicate"])
        | {"duplicate_of": name_document(*keeper), "similarity": 0.7 + n / 20}
        for n, keeper in enumerate(keepers)
    ]
    return [
        *near,
        exclude("web", 5, "exact_duplicates", ["exact_duplicate"], similarity=1.0)
        | {"duplicate_of": name_document("books", 2)},
        exclude("web", 6, "quality", ["too_short"]),
        exclude("web", 9, "decontaminate", ["gsm8k"])
        | {"details": json.dumps({"evaluation_items": hits})},
    ]


def write_corpus(run: Run, earlier: Path) -> None:
    """Documents 0 to 6, 9 and 10 of "web" are not kept; 10 is held out."""
    quality = QualityConfig(min_chars=90).model_dump(mode="json")
    settings = {
        "quality": quality,
        "source_quality": [None, QualityConfig(min_chars=200).model_dump(mode="json")],
        "dedup": {"threshold": 0.7, "against": [str(earlier)]},
    }
    gone = {*range(7), 9, 10}
    with run.write("corpus", {"prepare": settings}, {}) as draft:
        write_rows(draft.path / "excluded/part-000000.parquet", EXCLUDED, list_excluded())
        for part, (source, size) in enumerate(PARTS):
            rows = [describe_document(source, n) for n in range(size - part)]
            stay = rows if part else [row for n, row in enumerate(rows) if n not in gone]
            write_rows(draft.path / f"documents/part-{part:06d}.parquet", DOCUMENTS, stay)
        kept = np.ones(49, bool)
        kept[sorted(gone)] = False
        np.save(draft.path / "kept.npy", kept)
        duplicates = {"clusters": {"2": 4, "3": 1}, "candidates": 9, "verified": 6}
        items = {"ngram": 13, "granularity": "line", "method": "ngram", "items": {"gsm8k": 1319}}
        write_json(draft.path / "funnel.json", describe(make_tally(), duplicates, items))
        draft.summary["decide_seconds"] = 1.5


def make_tally() -> Tally:
    example = {"doc_id": "a", "source": "web", "origin": "web:file@6", "url": None, "text": HOSTILE}
    return Tally(
        left={"": 40, "read": 20, "quality": 1, "exact_duplicates": 1, "near_duplicates": 5}
        | {"english_held_out": 1, "decontaminate": 1},
        dropped={
            "read": {"empty": 2, "invalid_json": 18},
            "quality": {"too_short": 1, "repeated_lines": 1},
            "exact_duplicates": {"exact_duplicate": 1},
            "near_duplicates": {"near_duplicate": 5},
            "english_held_out": {"english_held_out": 1},
            "decontaminate": {"gsm8k": 1},
        },
        sources={
            "web": {"read": 40, "documents": 21, "chars": 6000},
            "books": {"read": 30, "documents": 19, "chars": 3000},
        },
        domains={HOSTILE * 9: {"read": 49, "documents": 40, "chars": 9000}},
        languages={f"l{n}": {"read": n, "documents": 0, "chars": 0} for n in range(600)},
        lengths={"": {"07": 30, "09": 10}, "quality": {"04": 1}, "near_duplicates": {"09": 5}},
        contamination={"gsm8k": {"documents": 9, "items": {f"test#{n}": n + 1 for n in range(6)}}},
        removed={"held_out_lines": 3, "pii_mails": 2},
        examples={
            "too_short": [example],
            "kept": [example],
            "held_out_line": [example],
            "near_duplicate": [example],
            "gsm8k": [example],
        },
    )


def write_shards(run: Run) -> None:
    with run.write("tokenizer", {}, {}) as draft:
        rows = [{"name": "bpe", "vocab_size": 512, "bytes_per_token": 3.2, "languages": {}}]
        write_json(draft.path / "comparison.json", rows)
    domain = {"wanted_share": 0.8, "share": 0.75, "tokens": 3000, "documents": 30, "epochs": 1.5}
    more = {"available_documents": 20, "bound": "max_epochs"}
    with run.write("shards", {}, {}) as draft:
        split = {"rows": 40, "tokens": 4000, "shards": [{}]}
        index = {"sequence_length": 128, "vocab_size": 512, "splits": {"train": split}}
        write_json(draft.path / "index.json", index)
        write_json(draft.path / "mixture.json", {"tokens": 4000, "domains": {"web": domain | more}})
        draft.summary |= {"padding_share": 0.02, "bytes_per_token": 3.1}


@pytest.fixture(scope="session")
def data_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of the run; do not write into it."""
    root = tmp_path_factory.mktemp("report")
    earlier = root / "earlier"
    rows = [describe_document("other", number) for number in range(9)]
    write_rows(earlier / "corpus/documents/part-000000.parquet", DOCUMENTS, rows)
    run = Run(root / "run")
    write_documents(run)
    write_signals(run)
    write_corpus(run, earlier)
    write_shards(run)
    return run.root
