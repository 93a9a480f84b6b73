from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from raylign.data.documents import DOCUMENTS
from raylign.data.synthesis.answers import Answer
from raylign.data.synthesis.documents import REJECTED, Output, PartWriter, Tally, Teacher, to_table
from raylign.data.synthesis.prompts import DrawnPrompt
from raylign.data.synthesis.styles import Style

TEACHER = Teacher("tutor", "abc", {"temperature": 0.8})
STYLE = Style("textbook", "On {topic}", ("topic",), "prose", 1.0)


def make_output(number: int, *reasons: str) -> Output:
    prompt = DrawnPrompt(f"On t{number // 2}", STYLE, f"t{number // 2}", None, "parent")
    answer = Answer(f" text {number} ", "stop", 10 + number, 7)
    return Output(f"{number:032x}", prompt, number % 2, 99, answer, f"text {number}", reasons)


def test_a_document_carries_its_provenance() -> None:
    [row] = to_table([make_output(3)], TEACHER, DOCUMENTS).to_pylist()
    assert (row["doc_id"], row["text"], row["domain"]) == (f"{3:032x}", "text 3", "synthetic")
    assert row["url"] is None and row["date"] is None
    assert json.loads(row["meta"]) == {
        "synthetic": True,
        "model": "tutor",
        "model_hash": "abc",
        "weights_version": 7,
        "style": "textbook",
        "topic": "t1",
        "audience": None,
        "seed_document": "parent",
        "prompt_hash": make_output(3).prompt.hash,
        "sample": 1,
        "sampling": {"temperature": 0.8, "seed": 99},
        "finish_reason": "stop",
        "tokens": 13,
    }


def test_parts_hold_a_fixed_number_of_outputs(tmp_path: Path) -> None:
    parts = PartWriter(tmp_path, TEACHER, size=3)
    for number in range(7):
        parts.add(make_output(number, *(["too_short", "refusal"] if number % 3 == 1 else [])))
        assert len(list((tmp_path / "documents").iterdir())) == (number + 1) // 3
    parts.close()

    def read(name: str, column: str) -> list[list[object]]:
        files = sorted((tmp_path / name).iterdir())
        return [pq.read_table(file)[column].to_pylist() for file in files]

    assert read("documents", "text") == [["text 0", "text 2"], ["text 3", "text 5"], ["text 6"]]
    assert read("rejected", "text") == [["text 1"], ["text 4"], []]
    assert read("rejected", "reasons")[0] == [["too_short", "refusal"]]
    assert read("prompts", "prompt") == [["On t0", "On t1"], ["On t1", "On t2"], ["On t3"]]


def test_without_outputs_there_is_one_empty_part(tmp_path: Path) -> None:
    PartWriter(tmp_path, TEACHER, size=3).close()
    assert pq.read_schema(tmp_path / "documents/part-00000.parquet").equals(DOCUMENTS)
    assert pq.read_table(tmp_path / "rejected/part-00000.parquet").schema.equals(REJECTED)


def test_the_tally_counts_every_reason() -> None:
    tally = Tally()
    for number in range(3):
        tally.add(make_output(number, *(["refusal", "too_short"] if number == 1 else [])))
    assert tally.to_json() == {
        "outputs": 3,
        "accepted": 2,
        "tokens": 33,
        "accepted_tokens": 22,
        "rejected_for": {"too_short": 1, "refusal": 1},
        "styles": {"textbook": {"outputs": 3, "accepted": 2}},
    }
