"""`python -m jobs.data_report`: made once, found again, made anew of other stages."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from jobs import data_report
from raylign.config import Recipe, UserError
from raylign.data.documents import DOCUMENTS
from raylign.data.tables import write_parquet
from raylign.run import Run, verify, write_json
from raylign.tracking import ProgressBoard


def write_documents(run: Run, texts: list[str]) -> None:
    with run.write("documents", {"texts": texts}, {}) as draft:
        (draft.path / "documents").mkdir()
        rows = [
            dict.fromkeys(DOCUMENTS.names, "") | {"doc_id": str(n), "text": text}
            for n, text in enumerate(texts)
        ]
        table = pa.Table.from_pylist(rows, DOCUMENTS)
        write_parquet(table, draft.path / "documents/part-000000.parquet")
        size = sum(map(len, texts))
        report = {"source": "web", "documents": len(texts), "used": len(texts), "rejected": {}}
        write_json(draft.path / "reading.json", [report | {"chars": size, "bytes": size}])


def go(run: Run) -> str:
    out = io.StringIO()
    recipe = Recipe.model_validate({"run": run.root})
    data_report.run(recipe, run, ProgressBoard(Console(file=out, width=200)))
    return out.getvalue()


def test_the_stage(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    write_documents(run, ["one", "two"])
    assert "data.html" in go(run)
    stage, documents = run.find("data_report"), run.find("documents")
    assert stage is not None and documents is not None
    assert stage.manifest.parents == {"documents": documents.manifest.content}
    assert set(stage.manifest.files) == {"data.html", "data.json"} and not verify(stage)
    assert stage.manifest.summary["documents"] == 2
    assert stage.manifest.summary["missing"][0] == "signals"
    assert "already done" in go(run)


def test_a_report_of_other_stages_is_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    write_documents(run, ["one", "two"])
    go(run)
    write_documents(run, ["one", "two", "three"])
    assert "already done" not in go(run)
    data = json.loads((run.root / "data_report" / "data.json").read_text())
    assert data["headline"]["documents"] == 3


def test_a_run_without_documents(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no finished 'documents' stage.*jobs\.prepare"):
        go(Run(tmp_path / "run"))
    assert not (tmp_path / "run" / "data_report").exists()
