"""Every format of demonstrations, and what of it is refused."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.config import UserError
from raylign.data.chat.faults import find_fault
from raylign.data.chat.reading import find_format
from raylign.data.instructions import (
    Continuation,
    Dialogue,
    UnusableError,
    parse_row,
    read_calls,
    read_tools,
    recognise,
)
from raylign.data.rows import read_rows

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "instruct"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
SCHEMA = {"name": "add", "parameters": {"type": "object"}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, *calls: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    return message | {"tool_calls": list(calls)} if calls else message


def parse(row: dict[str, Any], format: str) -> Dialogue:
    found = parse_row(row, format)
    assert isinstance(found, Dialogue)
    return found


def test_messages_of_openai() -> None:
    spelt = {"id": "call_1", "type": "function"}
    spelt |= {"function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    row = {
        "messages": [
            {"role": "system", "content": "s", "name": None},
            {"role": "user", "content": [{"type": "text", "text": "1 +"}, " 2?"]},
            {"role": "assistant", "content": None, "tool_calls": [spelt], "refusal": None},
            {"role": "tool", "tool_call_id": "call_1", "content": "3"},
            {"role": "assistant", "content": "3", "tool_calls": None},
        ],
        "tools": [{"type": "function", "function": SCHEMA}],
    }
    found = parse(row, "messages")
    assert found.messages == [
        {"role": "system", "content": "s"},
        user("1 + 2?"),
        assistant("", {"id": "call_1"} | CALL),
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
        assistant("3"),
    ]
    assert found.tools == [{"type": "function", "function": SCHEMA}] and found.given == 0
    assert find_fault(found.messages) is None


def test_sharegpt_with_calls() -> None:
    row = {
        "system": "s",
        "tools": json.dumps([SCHEMA]),
        "conversations": [
            {"from": "human", "value": "1 + 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "It is 3."},
        ],
    }
    found = parse(row, "sharegpt")
    assert found.messages == [
        {"role": "system", "content": "s"},
        user("1 + 2?"),
        assistant("", CALL),
        {"role": "tool", "content": "3"},
        assistant("It is 3."),
    ]
    assert found.tools == [{"type": "function", "function": SCHEMA}]
    assert parse({**row, "tools": "[]", "system": ""}, "sharegpt").tools is None
    strange = parse({"conversations": [{"from": "oracle", "value": "x"}]}, "sharegpt")
    assert find_fault(strange.messages) == "unknown role 'oracle'"


def test_alpaca_with_input_system_and_history() -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    assert parse(row, "alpaca").messages == [user("Add.\n\n1, 2"), assistant("3")]
    assert parse({**row, "input": " "}, "alpaca").messages == [user("Add."), assistant("3")]
    more = {**row, "input": None, "system": "s", "history": [["a", "b"], ["c", "d"]]}
    assert parse(more, "alpaca").messages == [
        {"role": "system", "content": "s"},
        *[user("a"), assistant("b"), user("c"), assistant("d"), user("Add."), assistant("3")],
    ]


def test_prompts_and_completions_of_both_kinds() -> None:
    plain = parse_row({"prompt": "1 + 2 =", "completion": " 3"}, "prompt-completion")
    assert plain == Continuation("1 + 2 =", " 3")
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    found = parse(row, "prompt-completion")
    assert found.messages == [user("a"), assistant("b"), user("c"), assistant("d")]
    assert found.given == 3


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("messages", {"text": "x"}, "no `messages` column"),
        ("messages", {"messages": None}, "no `messages` column"),
        ("messages", {"messages": "hello"}, "`messages` that are not a list"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "a message with content that is not text",
        ),
        ("messages", {"messages": [user("x")], "tools": "{oops"}, "`tools` that are not a JSON"),
        (
            "sharegpt",
            {"conversations": [{"from": "function_call", "value": "add(1, 2)"}]},
            "a tool call that is not a JSON object with a name",
        ),
        ("alpaca", {"instruction": "x"}, "no `output` column"),
        ("alpaca", {"instruction": "x", "output": "y", "history": [["a"]]}, "a `history` that is"),
        ("alpaca", {"instruction": "x", "output": "y", "history": "a"}, "a `history` that is"),
        ("prompt-completion", {"prompt": " ", "completion": "x"}, "an empty `prompt`"),
        ("prompt-completion", {"prompt": "x", "completion": ""}, "an empty `completion`"),
        ("prompt-completion", {"prompt": "x", "completion": [user("x")]}, "`prompt` and `compl"),
        ("prompt-completion", {"prompt": [user("x")], "completion": []}, "an empty `prompt` or"),
        ("prompt-completion", {"prompt": 3, "completion": 4}, "`prompt` that are not a list"),
    ],
)
def test_rows_that_are_none_of_their_format(format: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableError) as caught:
        parse_row(row, format)
    assert str(caught.value).startswith(reason)


def test_calls_and_tools_are_brought_into_one_form() -> None:
    function = CALL["function"]
    assert read_calls([function, CALL]) == read_calls(json.dumps([function, CALL])) == [CALL, CALL]
    with pytest.raises(UnusableError, match="arguments are not a JSON object"):
        read_calls({"name": "add", "arguments": "1, 2"})
    assert read_tools(None) is read_tools("") is read_tools([]) is None
    assert read_tools([{"type": "code_interpreter"}]) == [{"type": "code_interpreter"}]


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ("messages tools", "messages"),
        ("prompt prompt_id messages", "messages"),
        ("conversations tools system", "sharegpt"),
        ("instruction input output", "alpaca"),
        ("prompt completion", "prompt-completion"),
    ],
)
def test_formats_are_recognised_by_their_columns(columns: str, format: str) -> None:
    names = columns.split()
    assert recognise([{name: "x"} for name in names], "here") == format, "over several rows"


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (
            "text url",
            "here: its columns (text, url) are of no known format; rename them to those of one: "
            "messages: messages; prompt-completion: prompt, completion; alpaca: instruction, "
            "output; sharegpt: conversations",
        ),
        ("", "here: its columns (none) are of no known format; "),
        (
            "prompt completion messages",
            "here: its columns (completion, messages, prompt) fit messages and prompt-completion; "
            "give sft.format",
        ),
        (
            "prompt chosen rejected conversations",
            "here: its columns (chosen, conversations, prompt, rejected) hold comparisons; they "
            "are for `python -m jobs.preference`, or give sft.format",
        ),
    ],
)
def test_columns_of_no_format_are_one_clear_line(columns: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        recognise([dict.fromkeys(columns.split(), "x")], "here")
    assert str(caught.value).startswith(line)


ROWS = [{"instruction": "c", "output": "d", "input": "e"}, {"instruction": "a", "output": "b"}]


def write(directory: Path, kind: str) -> Path:
    """The rows above as one kind of file."""
    file = directory / f"rows.{kind}"
    if kind == "json":
        file.write_text(json.dumps(ROWS, indent=1))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    else:
        lines = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()
        file.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    return file


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "jsonl.gz"])
def test_files_of_every_kind_give_the_same_rows(tmp_path: Path, kind: str) -> None:
    found = list(read_rows(write(tmp_path, kind), "rows"))
    kept = [(number, {k: v for k, v in row.items() if v}) for number, row in found]  # type: ignore[union-attr]
    assert kept == [(1, ROWS[0]), (2, ROWS[1])]


def test_parquet_fields_of_other_rows_are_not_there(tmp_path: Path) -> None:
    """A table has every field in every row."""
    rows = [
        {"messages": [user("x"), assistant("y")]},
        {"messages": [user("x"), {**assistant(""), "tool_calls": '[{"name": "add"}]'}]},
    ]
    fields = [("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.string())]
    schema = pa.schema([("messages", pa.list_(pa.struct(fields)))])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    first, second = (row for _, row in read_rows(tmp_path / "rows.parquet", "rows"))
    assert first == rows[0]
    assert isinstance(second, dict)
    [call] = parse(second, "messages").messages[1]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": {}}


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    def refuse(file: Path) -> str:
        with pytest.raises(UserError) as caught:
            list(read_rows(file, "rows"))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "do not exist; give JSON lines, a JSON array or Parquet" in refuse(tmp_path / "none")
    assert "do not exist" in refuse(tmp_path)
    for kind, message in (("json", "not a valid JSON array"), ("parquet", "cannot be read")):
        file = write(tmp_path, kind)
        file.write_bytes(file.read_bytes()[:-5])
        assert message in refuse(file)
    file = write(tmp_path, "jsonl.gz")
    file.write_bytes(file.read_bytes()[:-9])
    assert "cannot be read" in refuse(file)


def test_lines_that_are_no_rows_keep_their_number(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n\n{"a"\n[2]\n"\xff"\n{"a": 3}\n')
    assert list(read_rows(tmp_path / "rows.jsonl", "rows")) == [
        (1, {"a": 1}),
        (3, "not valid JSON"),
        (4, "not a JSON object"),
        (5, "not valid JSON"),
        (6, {"a": 3}),
    ]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no public data in ../shared/data/instruct")
@pytest.mark.parametrize(
    ("name", "format", "roles"),
    [
        ("alpaca_en_demo.json", "alpaca", {"user": 999, "assistant": 999}),
        ("identity.json", "alpaca", {"user": 91, "assistant": 91}),
        (
            "glaive_toolcall_en_demo.json",
            "sharegpt",
            {"user": 746, "assistant": 957, "tool": 211},
        ),
    ],
)
def test_public_data_is_read_without_loss(name: str, format: str, roles: dict[str, int]) -> None:
    assert find_format(SHARED / name) == format
    dialogues = []
    for _, row in read_rows(SHARED / name, "rows"):
        assert isinstance(row, dict)
        dialogues.append(parse(row, format))
    assert not [each for each in dialogues if find_fault(each.messages, ("<eos>",))]
    assert Counter(m["role"] for each in dialogues for m in each.messages) == roles
    if format == "sharegpt":
        calls = [m for each in dialogues for m in each.messages if m.get("tool_calls")]
        assert len(calls) == 211
        assert sum(each.tools is None for each in dialogues) == 109
