"""Judgements of answers as people store them: pairs, labelled answers, labelled steps.

The formats of TRL (standard and conversational, with the prompt apart or inside both answers),
Anthropic's HH-RLHF texts, ShareGPT's columns as LLaMA-Factory has them, and UltraFeedback's.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raylign.config import UserError
from raylign.data.instructions import Message, UnusableError, read_messages, read_tools

Row = Mapping[str, Any]
Text = str | list[Message]
"""Plain text, or messages for a chat template."""
Kind = Literal["pairs", "labelled", "steps"]

_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to a prompt, one of them better. All three are text, or all are messages."""

    prompt: Text
    """Empty where two texts have no beginning in common."""
    chosen: Text
    rejected: Text
    margin: float = 0.0
    """How much better, in rewards."""
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer that is desirable, or right, or not."""

    prompt: Text
    answer: Text
    good: bool
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The steps of an answer, each right or wrong."""

    prompt: Text
    steps: tuple[str, ...]
    right: tuple[bool, ...]
    tools: list[dict[str, Any]] | None = None


Judgement = Preference | Verdict | Reasoning


@dataclass(frozen=True, slots=True)
class Format:
    """A way to store judgements."""

    kind: Kind
    columns: tuple[str, ...]
    """Without which a row is not of this format."""
    parse: Callable[[Row], Judgement]
    """Raises `UnusableError`."""


def recognise(rows: Sequence[Row], where: str, key: str) -> str:
    """The format of a file's first rows, by their columns; of several that fit, the one that needs
    most of them, or comes first. Raises `UserError`, naming the recipe's `key`, when none fits."""
    found = {name for row in rows for name, value in row.items() if value is not None}
    fitting = [name for name, form in FORMATS.items() if found.issuperset(form.columns)]
    if "hh" in fitting and not all(_is_hh(row) for row in rows):
        fitting.remove("hh")
    if fitting:
        return max(fitting, key=lambda name: len(FORMATS[name].columns))
    columns = ", ".join(sorted(found)) or "none"
    known = "; ".join(f"{name}: {', '.join(form.columns)}" for name, form in FORMATS.items())
    raise UserError(
        f"{where}: its columns ({columns}) are of no known format; rename them to those of one "
        f"({known}), and give {key} to choose it"
    )


def require_format(name: str, key: str) -> str:
    """`name`, if it is a format or `auto`; raises `UserError`, naming the recipe's `key`."""
    if name == "auto" or name in FORMATS:
        return name
    close = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"{key}={name}: unknown; {hint}choose auto, {', '.join(FORMATS)}")


def parse_judgement(row: Row, format: str) -> Judgement:
    """What a row of `format`, a name of `FORMATS`, judges; raises `UnusableError`."""
    form = FORMATS[format]
    for name in form.columns:
        if row.get(name) is None:
            raise UnusableError(f"no `{name}` column")
    return form.parse(row)


def _parse_pair(row: Row) -> Preference:
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        if not prompt.strip():
            raise UnusableError("an empty `prompt`")
        return _pair(prompt, chosen, rejected, row)
    if isinstance(prompt, str) and _is_conversation(chosen):
        return _parse_implicit(row)  # the prompt is said once more, as the first message
    return _pair(
        _read_prompt(prompt, "prompt"),
        _read_answer(chosen, "chosen"),
        _read_answer(rejected, "rejected"),
        row,
    )


def _parse_implicit(row: Row) -> Preference:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        length = _share_words(chosen, rejected)
        return _pair(chosen[:length], chosen[length:], rejected[length:], row)
    return _split(read_messages(chosen, "chosen"), read_messages(rejected, "rejected"), row)


def _parse_hh(row: Row) -> Preference:
    return _split(_read_turns(row["chosen"]), _read_turns(row["rejected"]), row)


def _parse_sharegpt_pair(row: Row) -> Preference:
    prompt = _read_system(row) + read_messages(row["conversations"], "conversations")
    chosen, rejected = (_read_answer(row[name], name) for name in ("chosen", "rejected"))
    return _pair(prompt, chosen, rejected, row)


def _parse_labelled(row: Row) -> Verdict:
    prompt, answer, good = row["prompt"], row["completion"], _read_label(row["label"])
    if isinstance(prompt, str) and isinstance(answer, str):
        if not prompt.strip():
            raise UnusableError("an empty `prompt`")
        return Verdict(prompt, answer, good)
    before = _read_prompt(prompt, "prompt")
    return Verdict(before, _read_answer(answer, "completion"), good, read_tools(row.get("tools")))


def _parse_conversation(column: str, label: str) -> Callable[[Row], Verdict]:
    def parse(row: Row) -> Verdict:
        messages = _read_system(row) + read_messages(row[column], column)
        if len(messages) < 2:
            raise UnusableError(f"`{column}` without a question and its answer")
        tools = read_tools(row.get("tools"))
        return Verdict(messages[:-1], messages[-1:], _read_label(row[label]), tools)

    return parse


def _parse_steps(row: Row) -> Reasoning:
    prompt, steps, labels = row["prompt"], row["completions"], row["labels"]
    if not isinstance(prompt, str):
        prompt = _read_prompt(prompt, "prompt")
    elif not prompt.strip():
        raise UnusableError("an empty `prompt`")
    if not isinstance(steps, list) or not isinstance(labels, list) or not steps:
        raise UnusableError("`completions` or `labels` that are not a list")
    if len(steps) != len(labels):
        raise UnusableError(f"{len(steps)} completions and {len(labels)} labels")
    if not all(isinstance(step, str) and step.strip() for step in steps):
        raise UnusableError("a step that is empty or not text")
    right = tuple(_read_label(label) for label in labels)
    return Reasoning(prompt, tuple(steps), right, read_tools(row.get("tools")))


FORMATS = {
    "hh": Format("pairs", ("chosen", "rejected"), _parse_hh),
    "pairs": Format("pairs", ("prompt", "chosen", "rejected"), _parse_pair),
    "implicit-pairs": Format("pairs", ("chosen", "rejected"), _parse_implicit),
    "sharegpt-pairs": Format(
        "pairs", ("conversations", "chosen", "rejected"), _parse_sharegpt_pair
    ),
    "labelled": Format("labelled", ("prompt", "completion", "label"), _parse_labelled),
    "labelled-messages": Format(
        "labelled", ("messages", "label"), _parse_conversation("messages", "label")
    ),
    "sharegpt-labelled": Format(
        "labelled", ("conversations", "label"), _parse_conversation("conversations", "label")
    ),
    "sharegpt-kto": Format(
        "labelled", ("conversations", "kto_tag"), _parse_conversation("conversations", "kto_tag")
    ),
    "steps": Format("steps", ("prompt", "completions", "labels"), _parse_steps),
}


def _pair(prompt: Text, chosen: Text, rejected: Text, row: Row) -> Preference:
    if chosen == rejected:
        raise UnusableError("`chosen` and `rejected` that are the same")
    margin = row.get("margin")
    if margin is None:
        margin = 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise UnusableError("a `margin` that is not a number")
    return Preference(prompt, chosen, rejected, float(margin), read_tools(row.get("tools")))


def _split(chosen: list[Message], rejected: list[Message], row: Row) -> Preference:
    """Two whole conversations: what they have in common is the prompt."""
    if chosen == rejected:
        raise UnusableError("`chosen` and `rejected` that are the same")
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    if length == 0:
        raise UnusableError("`chosen` and `rejected` that have no first message in common")
    if length == min(len(chosen), len(rejected)):
        raise UnusableError("an answer that is the beginning of the other one")
    return _pair(chosen[:length], chosen[length:], rejected[length:], row)


def _share_words(one: str, other: str) -> int:
    """Length of the longest common beginning of two texts that ends where a word does."""
    shortest = min(len(one), len(other))
    length = next((i for i in range(shortest) if one[i] != other[i]), shortest)
    while length and not one[length - 1].isspace():
        length -= 1
    return len(one[:length].rstrip())  # blanks go with the word after them


def _is_hh(row: Row) -> bool:
    texts = (row.get("chosen"), row.get("rejected"))
    return all(isinstance(text, str) and text.lstrip().startswith("Human:") for text in texts)


def _read_turns(value: Any) -> list[Message]:
    """The messages of "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    if not isinstance(value, str):
        raise UnusableError("a transcript that is not text")
    before, *turns = _TURN.split("\n\n" + value.lstrip("\n"))
    if before.strip() or not turns:
        raise UnusableError("a transcript that does not begin with `Human:`")
    speakers, texts = turns[::2], turns[1::2]
    return [
        {"role": _SPEAKERS[speaker], "content": text.strip()}
        for speaker, text in zip(speakers, texts, strict=True)
    ]


def _is_conversation(value: Any) -> bool:
    """Whether messages begin with a question and not with its answer."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return value[0].get("role", value[0].get("from")) in ("user", "human", "system")


def _read_prompt(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    messages = read_messages(value, column)
    if not messages:
        raise UnusableError(f"an empty `{column}`")
    return messages


def _read_answer(value: Any, column: str) -> list[Message]:
    """An answer as messages: given as some, as one, or as its text."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    messages = read_messages([value] if isinstance(value, dict) else value, column)
    if not messages:
        raise UnusableError(f"an empty `{column}`")
    return messages


def _read_system(row: Row) -> list[Message]:
    system = row.get("system")
    if not isinstance(system, str) or not system.strip():
        return []
    return [{"role": "system", "content": system}]


def _read_label(value: Any) -> bool:
    if value in (0, 1):  # True and False are among them
        return bool(value)
    raise UnusableError(f"a label {str(value)[:20]!r} that is neither true nor false")
