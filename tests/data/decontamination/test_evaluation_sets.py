from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.config import DecontaminateConfig, UserError
from raylign.config.decontamination import EvaluationSetConfig
from raylign.data.decontamination.columns import LAYOUTS, find_layouts, has_column, list_texts
from raylign.data.decontamination.evaluation_sets import load_items
from raylign.data.decontamination.index import Item


def load(task: str, path: Path, **keys: Any) -> list[Item]:
    chosen = EvaluationSetConfig(task=task, path=path, **keys)
    return load_items(DecontaminateConfig(against=(chosen,)))


def load_texts(task: str, path: Path, **keys: Any) -> list[tuple[str, str]]:
    return [(item.item, item.text) for item in load(task, path, **keys)]


def write_rows(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file


def test_texts_are_cleaned_as_documents_are(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"question": "a\\u00a0b\\r\\nu\\u0308 \\ud800 end "}\n')
    assert load_texts("gsm8k", file) == [("x.jsonl#0", "a b\nü ? end")]


def test_jsonl_plain_and_gzipped(tmp_path: Path) -> None:
    rows = [{"question": "one\u2028two", "answer": "a"}, {"question": "ü", "answer": ""}]
    file = write_rows(tmp_path / "test.jsonl", *rows)
    assert load_texts("gsm8k", file) == [("test.jsonl#0", "one\ntwo"), ("test.jsonl#1", "ü")]
    packed = tmp_path / "test.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert [text for _, text in load_texts("gsm8k", packed)] == ["one\ntwo", "ü"]
    both = load_texts("gsm8k", file, texts="both")
    assert [text for _, text in both] == ["one\ntwo", "a", "ü"]
    assert [text for _, text in load_texts("gsm8k", file, columns=("answer",))] == ["a"]


def test_thresholds_travel_with_items(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "x.jsonl", {"question": "q"})
    chosen = (EvaluationSetConfig(task="gsm8k", path=file),)
    config = DecontaminateConfig(against=chosen, min_words=5, min_coverage=0.7)
    assert load_items(config) == [Item("gsm8k", "x.jsonl#0", "q", 5, 0.0)]
    config = config.model_copy(update={"method": "coverage"})
    assert load_items(config) == [Item("gsm8k", "x.jsonl#0", "q", 5, 0.7)]


def test_nothing_to_load() -> None:
    assert load_items(DecontaminateConfig()) == []


MMLU = '"Who, said ""no""?",x,2,z\u0085y,w,B\nSecond?,a,b,c,d,A\n'


def test_mmlu_with_and_without_header(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "named").mkdir()
    (tmp_path / "bare" / "a_test.csv").write_text(MMLU, "utf-8")
    header = "question,choice0,choice1,choice2,choice3,answer\n"
    (tmp_path / "named" / "a_test.csv").write_text(header + MMLU, "utf-8-sig")
    for folder in ("bare", "named"):
        asked = load_texts("mmlu", tmp_path / folder)
        assert asked == [("a_test.csv#0", 'Who, said "no"?'), ("a_test.csv#1", "Second?")]
        offered = load_texts("mmlu_anatomy", tmp_path / folder, texts="answer")
        assert [text for _, text in offered] == ["x", "2", "z\ny", "w", "a", "b", "c", "d"]
    assert load_texts("own", tmp_path / "bare", columns=("1",))[0] == ("a_test.csv#0", "x")


def test_truthfulqa_in_its_published_files(tmp_path: Path) -> None:
    row = "Type,Category,Question,Best Answer,Correct Answers\nA,B,What is it?,A seed,A seed; two\n"
    (tmp_path / "TruthfulQA.csv").write_text(row, "utf-8-sig")
    assert load_texts("truthfulqa", tmp_path / "TruthfulQA.csv", texts="both") == [
        ("TruthfulQA.csv#0", "What is it?"),
        ("TruthfulQA.csv#0", "A seed"),
    ]
    marks = [{"question": "What?", "mc1_targets": {"x": 1}, "mc2_targets": {"x": 1, "y": 0}}]
    (tmp_path / "mc_task.json").write_text(json.dumps(marks, indent=1))
    both = load_texts("truthfulqa", tmp_path / "mc_task.json", texts="both")
    assert [text for _, text in both] == ["What?", "x", "y"]


def test_parquet_with_nested_columns(tmp_path: Path) -> None:
    rows = [{"question": "Why?", "choices": {"text": ["p", "q"], "label": ["A", "B"]}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part.parquet")
    both = load_texts("arc_challenge", tmp_path, texts="both")
    assert both == [("part.parquet#0", text) for text in ("Why?", "p", "q")]
    original = {"question": {"stem": "Why?", "choices": [{"text": "p"}, {"text": "q"}]}}
    file = write_rows(tmp_path / "ARC.jsonl", original)
    assert [text for _, text in load_texts("arc_easy", file, texts="both")] == ["Why?", "p", "q"]


def test_json_of_other_shapes(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"version": 1, "rows": [{"question": "a"}, {"question": "b"}]}')
    assert load_texts("gsm8k", file) == [("x.json#0", "a"), ("x.json#1", "b")]
    file.write_text('{"question": ["a", "b"], "answer": ["c", "d"]}')
    assert load_texts("gsm8k", file) == [("x.json#0", "a"), ("x.json#1", "b")]


def test_directories_are_read_in_order_with_their_folders(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_rows(tmp_path / "b" / "x.jsonl", {"question": "2"})
    write_rows(tmp_path / "a.jsonl", {"question": "1"})
    (tmp_path / "README.md").write_text("not a set")
    assert load_texts("gsm8k", tmp_path) == [("a.jsonl#0", "1"), ("b/x.jsonl#0", "2")]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", '{"question": "x"}\n{"question"\n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", '"text"\n', "row 0 of"),
        ("a.jsonl", '{"question": "x"}\n{"answer": "y"}\n', "row 1 of"),
        ("a.jsonl", '{"question": {"x": "y"}}\n', "holds no texts in row 0"),
        ("a.jsonl", '{"questions": "x"}\n', "did you mean 'questions'"),
        ("a.jsonl", "", "holds no items"),
        ("a.jsonl", '{"question": null}\n', "holds no items"),
        ("a.jsonl", '{"question": "\udcff"}\n', "cannot be read"),
        ("a.json", '{"a": 1}', "holds no list of rows"),
        ("a.json", "[", "cannot be read"),
        ("a.csv", "question,answer\nx\n", "row 0 of"),
        ("a.csv", 'question,answer\nx,"y\n', "cannot be read"),
        ("a.csv", "q,answer\nx,y\n", "has no column 'question'"),
        ("a.csv", '"Who\nis it?",x\nWhen?,y\n', "it has Who is it?, x; give"),
        ("a.csv.gz", "question\nx\n", "cannot be read"),
        ("a.parquet", "question", "cannot be read"),
        ("a.txt", "question", "convert it"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"prepare\.decontaminate\.against\[0\]") as raised:
        load("gsm8k", tmp_path / name)
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


def test_mistakes_in_the_recipe(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "test.jsonl", {"question": "x", "prompt": "y"})
    for task, path, keys, complaint in (
        ("gsm8", file, {}, "did you mean 'gsm8k'?"),
        ("gsm8k", tmp_path / "tst.jsonl", {}, "did you mean"),
        ("gsm8k", tmp_path / "none" / "at" / "all", {}, "does not exist"),
        ("held_out", file, {}, "choose another"),
        ("own", file, {"columns": ("promt",)}, "did you mean 'prompt'?"),
        ("ifeval", file, {"texts": "answer"}, "has only questions"),
    ):
        with pytest.raises(UserError, match=r"against\[0\]") as raised:
            load(task, path, **keys)
        assert complaint in str(raised.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds none of"):
        load("gsm8k", tmp_path / "empty")
    twice = (EvaluationSetConfig(task="gsm8k", path=file),) * 2
    with pytest.raises(UserError, match=r"against\[1\].*against\[0\] has this name too"):
        load_items(DecontaminateConfig(against=twice))


def test_families_and_paths() -> None:
    assert find_layouts("mmlu_anatomy") is LAYOUTS["mmlu"]
    assert find_layouts("mmlu_pro_law") is LAYOUTS["mmlu_pro"]
    assert find_layouts("mmlux") == ()
    row = {"a": {"b": [{"c": "x"}, {"c": None}]}, "a.d": "y", "n": 3, "t": True}
    assert list(list_texts(row, "a.b.c")) == ["x"]
    assert list(list_texts(row, "a.d")) == ["y"]
    assert list(list_texts(row, "n")) == ["3"]
    assert has_column(row, "a.b.c")
    assert not has_column(row, "a.b.d")
    with pytest.raises(TypeError):
        list(list_texts(row, "t"))
