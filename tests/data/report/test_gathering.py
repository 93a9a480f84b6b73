"""What is read of a run, against what was written into it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.config import QualityConfig, UserError
from raylign.data.quality.rules import judge
from raylign.data.report import gather, read_material
from raylign.data.report.evidence import find_documents, read_rows
from raylign.data.report.metrics import gather_metrics


def test_headline(data_run: Path) -> None:
    head = gather(read_material(data_run))["headline"]
    assert head["records"] == 69 and head["rejected"] == 20
    assert head["documents"] == 49 and head["unused"] == 1
    assert head["kept"] == 40 and head["kept_chars"] == 9000
    assert head["tokens"] == {"train": 4000}


def test_slices_beyond_a_limit_do_not_count(data_run: Path, tmp_path: Path) -> None:
    shutil.copytree(data_run / "documents", tmp_path / "run" / "documents")
    file = tmp_path / "run/documents/reading.json"
    reports = json.loads(file.read_text())
    reports[0]["used"], reports[1]["used"] = 15, 0
    file.write_text(json.dumps(reports))
    found = gather(read_material(tmp_path / "run"))
    head = found["headline"]
    assert (head["records"], head["rejected"], head["documents"], head["unused"]) == (
        25,
        10,
        15,
        35,
    )
    assert head["chars"] == round(reports[0]["chars"] / 2)
    assert {row["source"] for row in found["rejected"]} == {"web"}


def test_steps_name_the_setting_that_decides(data_run: Path) -> None:
    steps = {step["name"]: step for step in gather(read_material(data_run))["steps"]}
    assert steps["quality"]["reasons"][1] == {
        "reason": "too_short",
        "count": 1,
        "key": "min_chars",
        "value": 90,
    }
    assert [r["reason"] for r in steps["read"]["reasons"]] == ["invalid_json", "empty"]
    assert steps["decontaminate"]["out"] == 40


def test_what_rules_reject_is_what_judge_rejects(data_run: Path) -> None:
    found = gather_metrics(read_material(data_run))
    assert found["documents"] == found["of"] == 49
    reasons = []
    for part, shortest in ((0, 90), (1, 200)):
        table = pq.read_table(data_run / "signals" / f"part-{part:06d}.parquet")
        reasons += judge(table, QualityConfig(min_chars=shortest))
    counts = Counter(reason for found in reasons for reason in found)
    only = Counter(found[0] for found in reasons if len(found) == 1)
    assert counts["too_short"] > only["too_short"] > 0
    rules = {rule["reason"]: rule for rule in found["rules"]}
    on = [rule for rule in found["rules"] if rule["on"]]
    assert len(on) == 5
    for rule in on:
        assert rule["rejects"] == counts[rule["reason"]]
        assert rule["only"] == only[rule["reason"]]
    assert rules["too_short"]["threshold"] == 90 and rules["too_short"]["varies"]
    assert not rules["too_long"]["varies"]
    off = rules["gopher_few_words"]
    assert not off["on"] and off["threshold"] == 50 and off["only"] is None
    table = pa.concat_tables(pq.read_table(f) for f in sorted(data_run.glob("signals/*.parquet")))
    assert off["rejects"] == sum(words < 50 for words in table["words"].to_pylist())


def test_histograms_know_what_was_kept(data_run: Path) -> None:
    metrics = {m["name"]: m for m in gather_metrics(read_material(data_run))["metrics"]}
    shown = metrics["chars"]["histogram"]
    assert sum(shown["counts"]) == 49 and sum(shown["kept"]) == 40
    assert metrics["chars"]["meaning"] == "characters"


def test_signals_of_every_kind(data_run: Path, tmp_path: Path) -> None:
    for stage in ("documents", "signals"):
        shutil.copytree(data_run / stage, tmp_path / "run" / stage)
    for file in sorted((tmp_path / "run/signals").glob("*.parquet")):
        table = pq.read_table(file)
        scores = [None, float("nan")] + [2.5] * (len(table) - 2)
        table = table.append_column("education_score", pa.array(scores, pa.float32()))
        table = table.append_column("language", pa.array(["en"] * len(table)))
        table = table.append_column("url_blocked", pa.array([True] + [False] * (len(table) - 1)))
        table = table.append_column("empty", pa.nulls(len(table), pa.float32()))
        pq.write_table(table, file)
    found = gather(read_material(tmp_path / "run"))["signals"]
    assert "NaN" not in json.dumps(found)
    metrics = {metric["name"]: metric["histogram"] for metric in found["metrics"]}
    assert "empty" not in metrics and "language" not in metrics
    assert sum(metrics["education_score"]["counts"]) == 45
    assert metrics["url_blocked"]["counts"] == [2] and metrics["url_blocked"]["zeros"] == 47
    rules = {rule["reason"]: rule for rule in found["rules"]}
    assert rules["education_score"]["rejects"] == 45  # below 3, the default
    assert rules["blocklist_blocked_urls"]["rejects"] == 2


def test_a_sample_is_of_whole_row_groups_and_always_the_same(data_run: Path) -> None:
    material = read_material(data_run)
    first = gather_metrics(material, 20)
    assert first == gather_metrics(material, 20)
    assert first["of"] == 49 and 7 <= first["documents"] <= 20
    assert sum(first["metrics"][0]["histogram"]["counts"]) == first["documents"]
    assert gather_metrics(material, 1)["documents"] <= 7


def test_duplicates_beside_what_stands_for_them(data_run: Path) -> None:
    found = gather(read_material(data_run))["duplicates"]
    assert found["clusters"] == {"2": 4, "3": 1}
    pairs = found["pairs"]
    assert [pair["similarity"] for pair in pairs] == [0.7, 0.75, 0.8, 0.85, 0.9, 1.0]
    earlier = str(data_run.parent / "earlier")
    assert [pair["kept"] and pair["kept"]["where"] for pair in pairs] == [
        *("kept", "dropped later", "held out for evaluation", f"kept in {earlier}", None, "kept")
    ]
    assert pairs[-1]["stage"] == "exact_duplicates"
    assert found["similarity"][14:] == [1, 1, 1, 1, 1, 0]
    assert sum(found["similarity"]) == 5


def test_evaluation_items_by_task(data_run: Path) -> None:
    (task,) = gather(read_material(data_run))["decontamination"]["tasks"]
    assert (task["items"], task["occurred"], task["documents"]) == (1319, 6, 9)
    assert task["most"][0] == {"item": "test#5", "documents": 6}
    assert [hit["item"] for hit in task["excerpts"]] == ["test#0", "test#1", "test#2"]


def test_rejected_records_of_each_source_and_reason(data_run: Path) -> None:
    rows = gather(read_material(data_run))["rejected"]
    assert Counter((row["source"], row["reason"]) for row in rows) == {
        ("web", "invalid_json"): 3,
        ("web", "empty"): 1,
        ("books", "invalid_json"): 3,
        ("books", "empty"): 1,
    }
    assert rows[-1]["offset"] == 20


def test_long_groups_are_added_up(data_run: Path) -> None:
    rows = gather(read_material(data_run))["groups"]["languages"]
    assert len(rows) == 501 and rows[0]["name"] == "l599"
    assert rows[-1]["name"] == "(all others: 100)" and rows[-1]["read"] == sum(range(100))


def test_stages_have_times_and_parents(data_run: Path) -> None:
    stages = {stage["name"]: stage for stage in gather(read_material(data_run))["stages"]}
    assert list(stages) == ["documents", "signals", "corpus", "tokenizer", "shards"]
    assert stages["documents"]["worker_seconds"] == 2.0
    assert stages["corpus"]["documents"] == 49 and stages["shards"]["documents"] is None
    assert stages["shards"]["tokens"] == 4000 and stages["corpus"]["tokens"] is None


def test_it_is_json_and_depends_on_the_files_alone(data_run: Path, tmp_path: Path) -> None:
    shutil.copytree(data_run, tmp_path / "run")
    first, second = (gather(read_material(root)) for root in (data_run, tmp_path / "run"))
    assert json.dumps(first) == json.dumps(second)


def test_what_is_missing_is_named(data_run: Path, tmp_path: Path) -> None:
    shutil.copytree(data_run / "documents", tmp_path / "run" / "documents")
    found = gather(read_material(tmp_path / "run"))
    assert found["missing"] == ["signals", "signatures", "corpus", "tokenizer", "shards"]
    assert found["headline"]["documents"] == 49 and found["headline"]["kept"] is None
    assert found["signals"] == {} and found["duplicates"] == {} and len(found["rejected"]) == 8
    shutil.copytree(data_run / "signals", tmp_path / "run" / "signals")
    found = gather(read_material(tmp_path / "run"))
    assert found["signals"]["of"] == 49
    assert {m["histogram"]["kept"] is None for m in found["signals"]["metrics"]} == {True}


def test_a_run_without_documents_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no finished 'documents' stage; run `python -m"):
        read_material(tmp_path)


def test_a_damaged_file_is_named(data_run: Path, tmp_path: Path) -> None:
    shutil.copytree(data_run, tmp_path / "run")
    (tmp_path / "run/corpus/funnel.json").write_text("{")
    with pytest.raises(UserError, match=r"funnel\.json is damaged"):
        read_material(tmp_path / "run")


def test_rows_of_any_row_group(data_run: Path) -> None:
    file = data_run / "corpus/documents/part-000001.parquet"
    assert pq.ParquetFile(file).num_row_groups > 2
    everything = pq.read_table(file, columns=["doc_id"]).to_pylist()
    rows = [0, 6, 7, 18, 3]
    assert list(read_rows([file], [(0, row) for row in rows], ["doc_id"])) == [
        everything[row] for row in rows
    ]


def test_documents_are_found_once(data_run: Path) -> None:
    material = read_material(data_run)
    assert find_documents(material, set()) == {}
    ids = {row["doc_id"] for row in pq.read_table(data_run / "corpus/documents").to_pylist()}
    found = find_documents(material, ids)
    assert found.keys() == ids and {row["where"] for row in found.values()} == {"kept"}
