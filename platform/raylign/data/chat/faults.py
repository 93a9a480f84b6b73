"""What is no conversation to learn from, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

ROLES = ("assistant", "user", "system", "tool")


def find_fault(
    messages: Any, special_tokens: Iterable[str] = (), train_on: Iterable[str] = ("assistant",)
) -> str | None:
    """Why `messages` is not a conversation to learn from; None when it is.

    One is a list of {"role", "content"}: a system message at most in the first place, then users,
    assistants and what their tools returned, the assistant not first, and a turn of `train_on`
    among them. No content may be empty, but an assistant's that calls tools; none may spell a
    special token, which would end or forge a turn.
    """
    if not isinstance(messages, list) or not messages:
        return "no messages"
    spelling = _compile(tuple(special_tokens))
    for message in messages:
        if not isinstance(message, dict):
            return "a message that is not an object"
        content, calls = message.get("content"), message.get("tool_calls")
        if not isinstance(content, str) or not (content.strip() or calls):
            return "a message without text content"
        found = map(spelling.search, _list_texts([content, calls]))
        spelt = next(filter(None, found), None)
        if spelt is not None:
            return f"a message that spells the special token {spelt[0]}"
    return _find_misplaced(messages, tuple(train_on))


def _find_misplaced(messages: list[dict[str, Any]], train_on: tuple[str, ...]) -> str | None:
    """Why the roles do not follow each other; None when they do."""
    roles = [message.get("role") for message in messages]
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        return f"unknown role {unknown[0]!r}"
    if "system" in roles[1:]:
        return "a system message that is not the first"
    if roles[int(roles[0] == "system") :][:1] == ["assistant"]:
        return "an assistant that nobody asked"
    for before, message in zip([{}, *messages], messages, strict=False):
        if message["role"] == "tool" and not (
            before.get("role") == "tool" or before.get("tool_calls")
        ):
            return "a tool's result that no call precedes"
    if not set(roles) & set(train_on):
        return f"no {' or '.join(train_on)} turn"
    return None


def list_special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every special token, those without a name of their own included, and its id."""
    added = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return added | dict(named)


def _list_texts(value: Any) -> Iterator[str]:
    """Every string inside a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _list_texts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _list_texts(item)


@lru_cache(maxsize=8)
def _compile(special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    """What finds the first of them in a text, and nothing when there are none."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
