"""Demonstrations as people store them, and the conversations that they are.

Four formats: OpenAI's `messages`, a prompt and its completion, Alpaca's columns, and ShareGPT's
`conversations`. Tools and calls of them are brought into the one form that chat templates expect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylign.config import UserError

Message = dict[str, Any]
Row = Mapping[str, Any]

# Who speaks in ShareGPT's dialects.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLERS = ("function_call", "tool_call")


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation that a chat template renders."""

    messages: list[Message]
    """{"role", "content"}; an assistant's may have `tool_calls`."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of what the assistant may call."""
    given: int = 0
    """So many of the first messages are there to be read, and never trained."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """Plain text and how it goes on; no chat template is used."""

    prompt: str
    completion: str


class UnusableError(ValueError):
    """Why a row is none of its format; said of one row, never of the file."""


@dataclass(frozen=True, slots=True)
class Format:
    """A way to store demonstrations."""

    columns: tuple[str, ...]
    """Without which a row is not of this format."""
    parse: Callable[[Row], Dialogue | Continuation]
    """Raises `UnusableError`."""


def recognise(rows: Sequence[Row], where: str) -> str:
    """The format of a file's first rows, by their columns.

    Raises `UserError` when no format fits, or more than one does.
    """
    found = {name for row in rows for name, value in row.items() if value is not None}
    columns = ", ".join(sorted(found)) or "none"
    if found.issuperset(("chosen", "rejected")):
        raise UserError(
            f"{where}: its columns ({columns}) hold comparisons; they are for "
            "`python -m jobs.preference`, or give sft.format"
        )
    fitting = [name for name, form in FORMATS.items() if found.issuperset(form.columns)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(
            f"{where}: its columns ({columns}) fit {' and '.join(fitting)}; give sft.format"
        )
    known = "; ".join(f"{name}: {', '.join(form.columns)}" for name, form in FORMATS.items())
    raise UserError(
        f"{where}: its columns ({columns}) are of no known format; rename them to those of one: "
        f"{known}"
    )


def parse_row(row: Row, format: str) -> Dialogue | Continuation:
    """What a row of `format`, a name of `FORMATS`, demonstrates; raises `UnusableError`."""
    form = FORMATS[format]
    for name in form.columns:
        if row.get(name) is None:
            raise UnusableError(f"no `{name}` column")
    return form.parse(row)


def _parse_messages(row: Row) -> Dialogue:
    return Dialogue(read_messages(row["messages"], "messages"), read_tools(row.get("tools")))


def _parse_completion(row: Row) -> Dialogue | Continuation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        for name in ("prompt", "completion"):
            if not row[name].strip():
                raise UnusableError(f"an empty `{name}`")
        return Continuation(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise UnusableError("`prompt` and `completion` that are not both text, or both messages")
    before = read_messages(prompt, "prompt")
    after = read_messages(completion, "completion")
    if not before or not after:
        raise UnusableError("an empty `prompt` or `completion`")
    return Dialogue([*before, *after], read_tools(row.get("tools")), given=len(before))


def _parse_alpaca(row: Row) -> Dialogue:
    messages = _read_system(row)
    history = row.get("history") or []
    if not isinstance(history, list):
        raise UnusableError("a `history` that is not a list of pairs")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise UnusableError("a `history` that is not a list of pairs")
        messages += _pair(*turn)
    question, more = row["instruction"], row.get("input")
    if not isinstance(more, str | None):
        raise UnusableError("an `input` that is not text")
    if isinstance(question, str) and isinstance(more, str) and more.strip():
        question = f"{question}\n\n{more}"
    return Dialogue([*messages, *_pair(question, row["output"])])


def _parse_sharegpt(row: Row) -> Dialogue:
    messages = _read_system(row)
    messages += read_messages(row["conversations"], "conversations")
    return Dialogue(messages, read_tools(row.get("tools")))


FORMATS = {
    "messages": Format(("messages",), _parse_messages),
    "prompt-completion": Format(("prompt", "completion"), _parse_completion),
    "alpaca": Format(("instruction", "output"), _parse_alpaca),
    "sharegpt": Format(("conversations",), _parse_sharegpt),
}


def read_messages(value: Any, column: str) -> list[Message]:
    """Messages of OpenAI's kind ({"role", "content"}) or ShareGPT's ({"from", "value"}).

    Joins content that comes in parts of text, and drops fields that are null. What is no message is
    left for `find_fault`. Raises `UnusableError` where a list, a part or a call has another form.
    """
    if not isinstance(value, list):
        raise UnusableError(f"`{column}` that are not a list")
    return [_read_message(item) if isinstance(item, dict) else item for item in value]


def _read_message(item: dict[str, Any]) -> Message:
    message = {name: value for name, value in item.items() if value is not None}
    if "from" in message and "role" not in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str):
            raise UnusableError("a message whose speaker is not text")
        content = message.pop("value", None)
        if speaker in _CALLERS:
            return {"role": "assistant", "content": "", "tool_calls": read_calls(content)}
        message |= {"role": SPEAKERS.get(speaker, speaker), "content": content}
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_read_part(part) for part in message["content"])
    if not message.pop("tool_calls", None):
        return message
    calls = read_calls(item["tool_calls"])
    return message | {"content": message.get("content", ""), "tool_calls": calls}


def _read_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str) or (isinstance(part, dict) and part.get("type") != "text"):
        raise UnusableError("a message with content that is not text")
    return text


def read_calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls {"type", "function": {"name", "arguments"}}, of JSON or of what it says.

    Arguments that are JSON in a string, as OpenAI sends them, become the object they spell: chat
    templates write the JSON themselves. Raises `UnusableError`.
    """
    calls = []
    value = _load(value)
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UnusableError("a tool call that is not a JSON object with a name")
        arguments = _load(function.get("arguments", {}))
        if not isinstance(arguments, dict):
            raise UnusableError("a tool call whose arguments are not a JSON object")
        kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        called = {"name": function["name"], "arguments": arguments}
        calls.append(kept | {"type": "function", "function": called})
    return calls


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Schemas of tools, of JSON or of what it says, each {"type", "function"}; None for none.

    Raises `UnusableError`.
    """
    value = _load(value) if value else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UnusableError("`tools` that are not a JSON list of objects")
    if not all(isinstance(tool.get("function", {}), dict) for tool in value):
        raise UnusableError("a tool whose function is not a JSON object")
    return [tool if "function" in tool else _wrap(tool) for tool in value]


def _wrap(tool: dict[str, Any]) -> dict[str, Any]:
    """A function's schema as OpenAI wraps it; tools that are no functions have no name."""
    return {"type": "function", "function": tool} if "name" in tool else tool


def _load(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _read_system(row: Row) -> list[Message]:
    system = row.get("system")
    if isinstance(system, str) and not system.strip():
        return []
    return [] if system is None else [{"role": "system", "content": system}]


def _pair(question: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
