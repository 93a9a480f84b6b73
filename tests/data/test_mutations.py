"""Rows of every format with every part of them replaced by what it is not: each is either used or
rejected with a reason, and none ends the reading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from raylign.data.chat import read_demonstrations
from raylign.data.comparisons import Wanted, read_comparisons
from raylign.tokenization.train import train_bpe

JUNK: tuple[Any, ...] = (
    None, True, 3, 0.5, "", " ", "w", "[", "[1]", '{"a": 1}', [], ["w"], [[]], {}, {"a": 1},
)  # fmt: skip
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def tell(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


TALK = [say("system", "s"), say("user", "a"), say("assistant", "b")]
DEMONSTRATIONS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [
            *TALK[:2],
            say("assistant", "", tool_calls=[CALL]),
            say("tool", "3"),
            say("assistant", [{"type": "text", "text": "b"}]),
        ],
        "tools": [TOOL],
    },
    "sharegpt": {
        "conversations": [
            tell("human", "a"),
            tell("function_call", '{"name": "add", "arguments": {"a": 1}}'),
            tell("observation", "3"),
            tell("gpt", "b"),
        ],
        "system": "s",
        "tools": json.dumps([TOOL["function"]]),
    },
    "alpaca": {"instruction": "a", "input": "c", "output": "b", "history": [["d", "e"]]},
    "prompt-completion": {"prompt": "a", "completion": " b"},
    "prompt-completion of messages": {"prompt": TALK[:2], "completion": TALK[2:], "tools": [TOOL]},
}
PAIR = {"chosen": TALK[2:], "rejected": [say("assistant", "c")], "margin": 1.0}
COMPARISONS: dict[tuple[str, Any], dict[str, Any]] = {
    ("pairs", "pairs"): {"prompt": TALK[1:2], **PAIR},
    ("pairs", "text pairs"): {"prompt": "a", "chosen": " b", "rejected": " c"},
    ("pairs", "implicit-pairs"): {"chosen": TALK, "rejected": [*TALK[:2], say("assistant", "c")]},
    ("pairs", "hh"): {
        "chosen": "\n\nHuman: a\n\nAssistant: b",
        "rejected": "\n\nHuman: a\n\nAssistant: c",
    },
    ("pairs", "sharegpt-pairs"): {
        "conversations": [tell("human", "a")],
        "chosen": tell("gpt", "b"),
        "rejected": tell("gpt", "c"),
    },
    ("labelled", "labelled"): {"prompt": TALK[1:2], "completion": TALK[2:], "label": True},
    ("steps", "steps"): {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
}


def mutate(value: Any) -> Iterator[Any]:
    """`value` with one part replaced, or left out, in every way."""
    yield from JUNK
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in list(parts):
            for other in mutate(part):
                changed = value.copy()
                changed[key] = other
                yield changed
            without = value.copy()
            del without[key]
            yield without


def write(row: dict[str, Any], file: Path) -> int:
    rows = [row, *mutate(row)]
    file.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return len(rows)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made = train_bpe(["a b c d e s system user assistant tool add" * 3] * 9, 280, ())
    made.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
        "{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}{{ '<eos>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    return made


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations_are_used_or_rejected(name: str, tokenizer: Any, tmp_path: Path) -> None:
    count = write(DEMONSTRATIONS[name], tmp_path / "rows.jsonl")
    format = name.split(" of ")[0]
    found = read_demonstrations(tmp_path / "rows.jsonl", tokenizer, 512, 1.0, format=format)
    used = {conversation.row for conversation in found.conversations}
    refused = {rejection.row for rejection in found.rejected}
    assert min(used) == 1 and not used & refused
    assert used | refused == set(range(1, count + 1))
    assert len(refused) > count / 3


@pytest.mark.parametrize(("kind", "name"), COMPARISONS)
def test_comparisons_are_used_or_rejected(
    kind: Any, name: str, tokenizer: Any, tmp_path: Path
) -> None:
    count = write(COMPARISONS[kind, name], tmp_path / "rows.jsonl")
    format = "pairs" if name == "text pairs" else name
    wanted = Wanted(kind=kind, key="preference", max_length=512, format=format)
    found = read_comparisons(tmp_path / "rows.jsonl", tokenizer, wanted)
    refused = {rejection.row for rejection in found.rejected}
    assert found.rows + len(refused) == count
    assert 1 not in refused and len(refused) > count / 3
