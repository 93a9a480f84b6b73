"""Conversations as token ids, with the exact set of tokens that fine-tuning trains.

Which tokens those are is said once, by the chat template: what stands between its
`{% generation %}` markers. It is checked that a model asked at inference time sees exactly the
tokens that training put before each answer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from raylign.config import UserError

Message = dict[str, str]

_CHUNK = 512


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """One conversation; both arrays have length n."""

    token_ids: np.ndarray
    """int32 [n]"""
    trained: np.ndarray
    """bool [n]: True for what the assistant says, its closing token included."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A row that cannot be used."""

    row: int
    """1-based line of the file."""
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Demonstrations:
    """The usable rows of a file, in order, and the others."""

    conversations: list[Conversation]
    rejected: list[Rejection]


def read_demonstrations(
    file: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_rejected_share: float = 0.05,
) -> Demonstrations:
    """Conversations of a JSON-lines file whose rows have a `messages` column.

    Unusable rows are counted with their reason. Raises `UserError` when there is no such file,
    nothing is left, or more than `max_rejected_share` of the rows are unusable.
    """
    if not file.is_file():
        raise UserError(f"demonstrations {file} do not exist; give a JSON-lines file")
    conversations: list[Conversation] = []
    rejected: list[Rejection] = []
    with file.open(encoding="utf-8", errors="replace") as stream:
        rows = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
        while chunk := list(islice(rows, _CHUNK)):
            for number, result in _read_chunk(chunk, tokenizer, max_length):
                if isinstance(result, str):
                    rejected.append(Rejection(number, result))
                else:
                    conversations.append(result)
    _require_enough(file, len(conversations), rejected, max_rejected_share)
    return Demonstrations(conversations, rejected)


def find_fault(messages: Any, special_tokens: Iterable[str] = ()) -> str | None:
    """Why `messages` is not a conversation to learn from; None when it is.

    One is a list of {"role", "content"}: an optional system message, then user and assistant in
    turn, at least one of the assistant. No content may be empty or spell a special token, which
    would end or forge a turn.
    """
    if not isinstance(messages, list) or not messages:
        return "no messages"
    for message in messages:
        if not isinstance(message, dict):
            return "a message that is not an object"
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            return "a message without text content"
        spelt = next((token for token in special_tokens if token in content), None)
        if spelt is not None:
            return f"a message that spells the special token {spelt}"
    roles = [message.get("role") for message in messages]
    unknown = next((role for role in roles if role not in ("system", "user", "assistant")), None)
    if unknown is not None or None in roles:
        return f"unknown role {unknown!r}"
    turns = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[place % 2] for place, role in enumerate(turns)):
        return "roles that do not alternate, user first"
    if "assistant" not in roles:
        return "no assistant turn"
    return None


def encode_conversations(
    conversations: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase
) -> list[Conversation | str]:
    """Each conversation with its trained tokens, or the reason why the template garbles it."""
    if not conversations:
        return []
    whole = tokenizer.apply_chat_template(
        [list(messages) for messages in conversations],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    turns = [
        (index, place)
        for index, messages in enumerate(conversations)
        for place, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    prompts = tokenizer.apply_chat_template(
        [list(conversations[index][:place]) for index, place in turns],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    asked: dict[int, list[list[int]]] = {}
    for (index, _), prompt in zip(turns, prompts, strict=True):
        asked.setdefault(index, []).append(prompt)
    encoded: list[Conversation | str] = []
    for index, (ids, mask) in enumerate(
        zip(whole["input_ids"], whole["assistant_masks"], strict=True)
    ):
        trained = np.asarray(mask, bool)
        fault = _find_garbling(ids, trained, asked[index])
        encoded.append(fault or Conversation(np.asarray(ids, np.int32), trained))
    return encoded


def _find_garbling(ids: list[int], trained: np.ndarray, prompts: list[list[int]]) -> str | None:
    """Every answer must start where its prompt ends, and nothing else may be trained."""
    before = np.concatenate([[False], trained[:-1]])
    starts = np.flatnonzero(trained & ~before).tolist()
    if starts != [len(prompt) for prompt in prompts]:
        return "a chat template whose marked answers do not start where its prompts end"
    if any(ids[: len(prompt)] != prompt for prompt in prompts):
        return "a chat template whose prompts are not prefixes of its conversations"
    return None


def _read_chunk(
    chunk: Sequence[tuple[int, str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[int, Conversation | str]]:
    """(row, conversation or reason) for (row, line), in order."""
    results: dict[int, Conversation | str] = {}
    valid: list[tuple[int, list[Message]]] = []
    special = tokenizer.all_special_tokens
    for number, line in chunk:
        messages = _parse(line)
        fault = messages if isinstance(messages, str) else find_fault(messages, special)
        if fault is None:
            valid.append((number, messages))
        else:
            results[number] = fault
    encoded = encode_conversations([messages for _, messages in valid], tokenizer)
    for (number, _), result in zip(valid, encoded, strict=True):
        if not isinstance(result, str) and len(result.token_ids) > max_length:
            result = "longer than sequence_length"
        results[number] = result
    return ((number, results[number]) for number, _ in chunk)


def _parse(line: str) -> Any:
    """The messages of a line, or what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError:
        return "not valid JSON"
    if not isinstance(row, dict) or "messages" not in row:
        return "no `messages` column"
    messages = row["messages"]
    return "`messages` that are not a list" if isinstance(messages, str) else messages


def _require_enough(file: Path, used: int, rejected: Sequence[Rejection], max_share: float) -> None:
    total = used + len(rejected)
    if used and len(rejected) <= max_share * total:
        return
    if not total:
        raise UserError(f"demonstrations {file} are empty; give rows with a `messages` column")
    first = {rejection.reason: rejection.row for rejection in reversed(rejected)}
    counts = Counter(rejection.reason for rejection in rejected)
    reasons = "; ".join(
        f"{count} x {reason} (first in row {first[reason]})"
        for reason, count in counts.most_common(3)
    )
    raise UserError(
        f"demonstrations {file}: {len(rejected)} of {total} rows cannot be used: {reasons}; "
        "put them right or take them out"
    )
