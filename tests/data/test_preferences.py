"""Judged answers: every way to store them, their exact tokens, and what is turned away."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raylign.config import UserError
from raylign.data.comparisons.display import render_comparison
from raylign.data.comparisons.encoding import Answer, Compared, part, shorten
from raylign.data.comparisons.reading import (
    Comparisons,
    Wanted,
    read_comparisons,
    require_enough,
    write_rejections,
)
from raylign.data.instructions import UnusableError
from raylign.data.preferences import FORMATS, Preference, parse_judgement, recognise
from raylign.tokenization.train import train_bpe

PAIRS = Wanted(kind="pairs", key="preference", max_length=64)
REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "preference"


def say(*turns: str) -> list[dict[str, str]]:
    """Messages; user first."""
    return [
        {"role": ("user", "assistant")[place % 2], "content": text}
        for place, text in enumerate(turns)
    ]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def write(directory: Path, *rows: Any) -> Path:
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Any:
    def run(
        *rows: Any, wanted: Wanted = PAIRS, max_rejected_share: float = 0.05, **more: Any
    ) -> Comparisons:
        file = write(tmp_path, *rows)
        found = read_comparisons(file, tokenizer, replace(wanted, **more))
        require_enough(file, found, max_rejected_share, "preference")
        return found

    return run


def spell(tokenizer: PreTrainedTokenizerBase, item: Compared) -> list[str]:
    """The prompt, and each answer with what is not scored in brackets."""
    texts = [" ".join(tokenizer.convert_ids_to_tokens(item.prompt.tolist()))]
    for each in item.answers:
        words = tokenizer.convert_ids_to_tokens(each.token_ids.tolist())
        shown = zip(words, each.marks.tolist(), strict=True)
        texts.append(" ".join(word if mark else f"({word})" for word, mark in shown))
    return texts


CHAT = ["<user> w1 w2 <assistant>", "w3 <eos>", "w4 w5 <eos>"]
TEXT = ["w1 w2", "w3 <eos>", "w4 w5 <eos>"]
LONGER = ["<user> w1 <assistant> w2 <eos> <user> w3 <assistant>", "w4 <eos>", "w5 <eos>"]

SPELLINGS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "standard": ("pairs", {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4 w5"}, TEXT),
    "standard, closed": (
        "pairs",
        {"prompt": "w1 w2", "chosen": "w3<eos>", "rejected": "w4 w5"},
        TEXT,
    ),
    "standard, implicit": (
        "implicit-pairs",
        {"chosen": "w1 w2 w3", "rejected": "w1 w2 w4 w5"},
        TEXT,
    ),
    "nothing in common": (
        "implicit-pairs",
        {"chosen": "w3", "rejected": "w4 w5"},
        ["<eos>", "w3 <eos>", "w4 w5 <eos>"],
    ),
    "conversational": (
        "pairs",
        {"prompt": say("w1 w2"), "chosen": answer("w3"), "rejected": answer("w4 w5")},
        CHAT,
    ),
    "conversational, implicit": (
        "implicit-pairs",
        {"chosen": say("w1 w2", "w3"), "rejected": say("w1 w2", "w4 w5")},
        CHAT,
    ),
    "the prompt said twice": (
        "pairs",
        {"prompt": "w1 w2", "chosen": say("w1 w2", "w3"), "rejected": say("w1 w2", "w4 w5")},
        CHAT,
    ),
    "answers as text": (
        "pairs",
        {"prompt": say("w1", "w2", "w3"), "chosen": "w4", "rejected": "w5"},
        LONGER,
    ),
    "hh": (
        "hh",
        {
            "chosen": "\n\nHuman: w1\n\nAssistant: w2\n\nHuman: w3\n\nAssistant: w4",
            "rejected": "\n\nHuman: w1\n\nAssistant: w2\n\nHuman: w3\n\nAssistant: w5 ",
        },
        LONGER,
    ),
    "sharegpt": (
        "sharegpt-pairs",
        {
            "conversations": [
                {"from": "human", "value": "w1"},
                {"from": "gpt", "value": "w2"},
                {"from": "human", "value": "w3"},
            ],
            "chosen": {"from": "gpt", "value": "w4"},
            "rejected": {"from": "gpt", "value": "w5"},
        },
        LONGER,
    ),
    "answers of several turns": (
        "implicit-pairs",
        {"chosen": say("w1", "w2", "w3", "w4"), "rejected": say("w1", "w5")},
        ["<user> w1 <assistant>", "w2 <eos> (<user>) (w3) (<assistant>) w4 <eos>", "w5 <eos>"],
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_pairs_of_every_spelling(name: str, read: Any, tokenizer: Any) -> None:
    format, row, expected = SPELLINGS[name]
    found = read(row)
    assert found.format == format
    assert spell(tokenizer, found.items[0]) == expected
    assert read({**row, "margin": 1.5}).items[0].value == 1.5
    assert found.items[0].value == 0.0 and found.items[0].row == 1


LABELLED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "standard": ("labelled", {"prompt": "w1 w2", "completion": "w3"}, TEXT[:2]),
    "conversational": (
        "labelled",
        {"prompt": say("w1 w2"), "completion": answer("w3")},
        CHAT[:2],
    ),
    "messages": ("labelled-messages", {"messages": say("w1 w2", "w3")}, CHAT[:2]),
    "sharegpt": (
        "sharegpt-labelled",
        {"conversations": [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]},
        CHAT[:2],
    ),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_answers_of_every_spelling(name: str, read: Any, tokenizer: Any) -> None:
    format, row, expected = LABELLED[name]
    found = read({**row, "label": True}, {**row, "label": 0}, kind="labelled")
    assert found.format == format
    assert [item.value for item in found.items] == [1.0, 0.0]
    assert spell(tokenizer, found.items[0]) == spell(tokenizer, found.items[1]) == expected


def test_pairs_are_labelled_answers_too(read: Any, tokenizer: Any) -> None:
    found = read(SPELLINGS["conversational"][1], kind="labelled")
    assert [spell(tokenizer, item)[1] for item in found.items] == ["w3 <eos>", "w4 w5 <eos>"]
    assert [item.value for item in found.items] == [1.0, 0.0]
    assert found.rows == 1 and [item.row for item in found.items] == [1, 1]
    assert part(found.items[0]) == [found.items[0]]


@pytest.mark.parametrize("prompt", ["w1", say("w1")])
def test_steps_are_scored_where_they_end(prompt: Any, read: Any, tokenizer: Any) -> None:
    row = {"prompt": prompt, "completions": ["w2 w3", "w4 w9"], "labels": [True, False]}
    item = read(row, kind="steps", separator="w9").items[0]
    start = "w1" if isinstance(prompt, str) else "<user> w1 <assistant>"
    assert spell(tokenizer, item) == [start, "(w2) (w3) w9 (w4) w9"]
    assert item.answers[0].marks.tolist() == [0, 0, 1, 0, 2]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_files_of_every_kind(suffix: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = [SPELLINGS["conversational"][1]] * 2
    file = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        text = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
        file.write_text(text, encoding="utf-8")
    found = read_comparisons(file, tokenizer, PAIRS)
    assert [spell(tokenizer, item) for item in found.items] == [CHAT, CHAT]


GOOD = SPELLINGS["conversational"][1]


def test_examples_are_shown_token_by_token(read: Any, tokenizer: Any) -> None:
    item = read(GOOD).items[0]
    lines = list(render_comparison(item, tokenizer))
    assert [scored for _, scored in lines] == [False] * 4 + [True] * 5
    assert lines[0][0] == "prompt       0               2  '<user>'"
    assert lines[-1][0] == "rejected     2  score        1  '<eos>'"
    scores = [line for line, scored in render_comparison(item, tokenizer, at_end=0) if scored]
    assert [line.split()[:2] for line in scores] == [["chosen", "1"], ["rejected", "2"]]
    steps = {"prompt": "w1", "completions": ["w2", "w3"], "labels": [True, False]}
    item = read(steps, kind="steps", separator="w9").items[0]
    signs = [line.split()[2] for line, scored in render_comparison(item, tokenizer) if scored]
    assert signs == ["score", "wrong"]


FAULTS: dict[str, dict[str, Any]] = {
    "no `rejected` column": {"prompt": say("w1"), "chosen": answer("w2")},
    "`chosen` and `rejected` that are the same": {**GOOD, "rejected": GOOD["chosen"]},
    "answers that are the same in tokens": {**GOOD, "rejected": answer("w3 ")},
    "a message without text content": {**GOOD, "rejected": answer("  ")},
    "an empty `prompt`": {**GOOD, "prompt": []},
    "unknown role 'robot'": {**GOOD, "prompt": [{"role": "robot", "content": "w1"}]},
    "a message that spells the special token <user>": {**GOOD, "chosen": answer("<user>w1")},
    "a text that spells the special token <pad>": {
        "prompt": "w1<pad>",
        "chosen": "w2",
        "rejected": "w3",
    },
    "an empty answer": {"prompt": "w1", "chosen": "<eos>", "rejected": "w3"},
    "a `margin` that is not a number": {**GOOD, "margin": "much"},
    "an answer that is not the assistant's": {**GOOD, "chosen": say("w1", "w2")},
    "an answer that no question precedes": {**GOOD, "prompt": say("w1", "w2")},
    "longer than max_length": {**GOOD, "chosen": answer("w1 " * 80)},
    "not a JSON object": [1],  # type: ignore[dict-item]
}


@pytest.mark.parametrize("reason", FAULTS)
def test_unusable_pairs_are_counted_with_row_and_reason(reason: str, read: Any) -> None:
    found = read(GOOD, FAULTS[reason], GOOD, format="pairs", max_rejected_share=0.4)
    assert [(each.row, each.reason) for each in found.rejected] == [(2, reason)]
    assert [item.row for item in found.items] == [1, 3]


STEP_FAULTS = {
    "2 completions and 1 labels": {"completions": ["w1", "w2"], "labels": [True]},
    "a step that is empty or not text": {"completions": ["w1", " "], "labels": [1, 1]},
    "a label 'maybe' that is neither true nor false": {
        "completions": ["w1"],
        "labels": ["maybe"],
    },
    "a step that holds the separator 'w9'": {"completions": ["w1 w9 w2"], "labels": [1]},
}


@pytest.mark.parametrize("reason", STEP_FAULTS)
def test_unusable_steps(reason: str, read: Any) -> None:
    good = {"prompt": "w0", "completions": ["w1"], "labels": [True]}
    wanted = {"kind": "steps", "separator": "w9", "max_rejected_share": 0.5}
    found = read(good, {"prompt": "w0", **STEP_FAULTS[reason]}, **wanted)
    assert [each.reason for each in found.rejected] == [reason]


def test_conversations_without_a_common_question_are_no_pair() -> None:
    with pytest.raises(UnusableError, match="no first message in common"):
        parse_judgement({"chosen": say("a", "b"), "rejected": say("c", "d")}, "implicit-pairs")
    with pytest.raises(UnusableError, match="beginning of the other"):
        row = {"chosen": say("a", "b"), "rejected": say("a", "b", "c", "d")}
        parse_judgement(row, "implicit-pairs")


def test_a_common_beginning_ends_where_a_word_does() -> None:
    row = {"chosen": "It is 12 apples", "rejected": "It is 13 pears"}
    found = parse_judgement(row, "implicit-pairs")
    assert found == Preference("It is", " 12 apples", " 13 pears")


def make(prompt: list[int], *answers: list[int]) -> Compared:
    each = (Answer(np.array(a, np.int32), np.ones(len(a), np.uint8)) for a in answers)
    return Compared(np.array(prompt, np.int32), tuple(each))


@pytest.mark.parametrize(
    ("prompt", "answers", "expected"),
    [
        # The prompt gives way first, down to half of the room of 8.
        (range(6), ([10, 11, 12], [13]), ([1, 2, 3, 4, 5], [10, 11, 12], [13])),
        (range(6), ([10, 11, 12, 13, 14, 15], [16]), ([2, 3, 4, 5], [10, 11, 12, 13], [16])),
        # A short prompt stays whole.
        ([1, 2], ([10] * 9, [11]), ([1, 2], [10] * 6, [11])),
        # What opens every text stays too.
        ([99, *range(6)], ([10] * 5, [11]), ([99, 3, 4, 5], [10] * 4, [11])),
    ],
)
def test_what_is_too_long_is_cut(prompt: Any, answers: Any, expected: Any) -> None:
    cut = shorten(make(list(prompt), *answers), 8, opening=99)
    assert isinstance(cut, Compared)
    found = (cut.prompt.tolist(), *(a.token_ids.tolist() for a in cut.answers))
    assert found == expected


def test_a_cut_may_leave_nothing_to_compare() -> None:
    same = make([1, 2], [5] * 6 + [6], [5] * 6 + [7])
    assert shorten(same, 8, None) == "answers that differ only beyond max_length"
    item = make([1, 2], [5] * 8)
    item.answers[0].marks[:6] = 0
    assert shorten(item, 8, None) == "nothing to score within max_length"


def test_cuts_are_counted(read: Any) -> None:
    long = {**GOOD, "chosen": answer("w1 " * 80)}
    found = read(GOOD, long, too_long="truncate")
    assert found.truncated == 1 and not found.rejected
    assert found.items[1].longest == 64


def test_too_many_unusable_rows_stop_with_one_line(read: Any, tmp_path: Path) -> None:
    bad = {**GOOD, "rejected": GOOD["chosen"]}
    with pytest.raises(UserError) as error:
        read(GOOD, bad, bad, max_rejected_share=0.5)
    assert "2 of 3 rows cannot be used: 2 x `chosen` and `rejected` that are the same" in str(
        error.value
    )
    assert "(first in row 2)" in str(error.value) and "\n" not in str(error.value)
    found = read(GOOD, bad, max_rejected_share=0.5)
    write_rejections(found.rejected, tmp_path / "rejected.jsonl")
    line = json.loads((tmp_path / "rejected.jsonl").read_text("utf-8"))
    assert line == {"row": 2, "reason": "`chosen` and `rejected` that are the same"}


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([], {}, "are empty"),
        ([{"text": "w1"}], {}, r"columns \(text\) are of no known format"),
        ([GOOD], {"format": "sharegpt-pair"}, "did you mean sharegpt-pairs"),
        ([{"messages": say("w1", "w2"), "label": True}], {}, "choose preference.loss=kto"),
        ([GOOD], {"kind": "steps", "key": "reward_model"}, "choose reward_model.kind=pairs"),
    ],
)
def test_data_of_another_kind_stops_with_one_line(
    rows: Any, more: Any, message: str, read: Any
) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(*rows, **more)
    assert "\n" not in str(error.value)


def test_conversations_need_a_chat_template(tiny_model: Path, tmp_path: Path) -> None:
    bare = AutoTokenizer.from_pretrained(tiny_model)
    bare.chat_template = None
    hh = SPELLINGS["hh"][1]
    with pytest.raises(UserError, match=r"no chat template.*format=implicit-pairs reads"):
        read_comparisons(write(tmp_path, hh), bare, PAIRS)
    found = read_comparisons(write(tmp_path, hh), bare, replace(PAIRS, format="implicit-pairs"))
    assert found.rows == 1
    with pytest.raises(UserError, match="do not exist"):
        read_comparisons(tmp_path / "nothing.jsonl", bare, PAIRS)


def test_the_format_that_needs_most_columns_is_recognised() -> None:
    for name, form in FORMATS.items():
        row = dict.fromkeys(form.columns, "\n\nHuman: a\n\nAssistant: b")
        assert recognise([row], "here", "key") == name or name == "implicit-pairs"
    assert recognise([{"chosen": "a", "rejected": "b"}], "here", "key") == "implicit-pairs"


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared data is not next to the checkout")
def test_real_pairs_and_labels() -> None:
    texts = [(REAL / "dpo_en_demo.json").read_text("utf-8")[:200_000]]
    tokenizer = train_bpe(texts, 500)
    wanted = replace(PAIRS, max_length=100_000)
    pairs = read_comparisons(REAL / "dpo_en_demo.json", tokenizer, wanted)
    assert (pairs.format, pairs.rows, pairs.rejected) == ("sharegpt-pairs", 300, [])
    rows = json.loads((REAL / "dpo_en_demo.json").read_text("utf-8"))
    for row, item in zip(rows, pairs.items, strict=True):
        for name, each in zip(("chosen", "rejected"), item.answers, strict=True):
            scored = each.token_ids[each.marks > 0].tolist()
            assert scored[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(scored[:-1]).strip() == row[name]["value"].strip()
    wanted = replace(wanted, kind="labelled")
    labelled = read_comparisons(REAL / "kto_en_demo.json", tokenizer, wanted)
    assert (labelled.format, labelled.rows) == ("labelled-messages", 300)
    assert sum(item.value for item in labelled.items) == 150
