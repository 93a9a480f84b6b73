"""From a file of demonstrations to examples: what is used, what is not, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from raylign.config import UserError
from raylign.data.chat.encoding import Conversation, encode_continuations, encode_dialogues
from raylign.data.chat.faults import find_fault, list_special_tokens
from raylign.data.instructions import (
    Continuation,
    Dialogue,
    Row,
    UnusableError,
    parse_row,
    recognise,
)
from raylign.data.rows import read_rows
from raylign.models.loading import require_chat_template

_CHUNK = 512
# So many rows tell which columns a file has.
_PEEKED = 20
_WHAT = "demonstrations"

TooLong = Literal["drop", "truncate"]


@dataclass(frozen=True, slots=True)
class Rejection:
    """A row that cannot be used."""

    row: int
    """1-based: line of JSON lines, element of a JSON array, row of Parquet."""
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Demonstrations:
    """The usable rows of a file, in order, and the others."""

    conversations: list[Conversation]
    """A row gives several where the chat template rewrites earlier turns."""
    rejected: list[Rejection]
    format: str
    truncated: int = 0
    """Conversations that were cut."""

    @property
    def rows(self) -> int:
        """Usable rows."""
        return len({conversation.row for conversation in self.conversations})

    def describe(self) -> list[str]:
        """A line for every reason of rejection, the most frequent first, with its first row."""
        first = {rejection.reason: rejection.row for rejection in reversed(self.rejected)}
        counts = Counter(rejection.reason for rejection in self.rejected)
        return [f"{n:,} x {why} (first in row {first[why]})" for why, n in counts.most_common()]


def read_demonstrations(
    file: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_rejected_share: float = 0.05,
    *,
    format: str = "auto",
    train_on: Sequence[str] = ("assistant",),
    too_long: TooLong = "drop",
) -> Demonstrations:
    """Examples of a file of JSON lines, a JSON array or Parquet, of at most `max_length` tokens.

    `format` is a name of `raylign.data.instructions.FORMATS`, or `auto`. Unusable rows are counted
    with their reason. Raises `UserError` when there is no such file, its columns are of no format,
    nothing is left, or more than `max_rejected_share` of the rows are unusable.
    """
    if format == "auto":
        format = find_format(file)
    reader = _Reader(tokenizer, max_length, format, tuple(train_on), too_long)
    rows = read_rows(file, _WHAT)
    while chunk := list(islice(rows, _CHUNK)):
        reader.add(chunk)
    found = Demonstrations(reader.conversations, reader.rejected, format, reader.truncated)
    require_enough(file, found, max_rejected_share)
    return found


def find_format(file: Path) -> str:
    """The format of a file's first rows; raises `UserError` when they are of none."""
    first = [row for _, row in islice(read_rows(file, _WHAT), _PEEKED)]
    rows = [row for row in first if isinstance(row, dict)]
    if not first:
        raise UserError(f"{_WHAT} {file} are empty; give rows with a `messages` column, or others")
    return recognise(rows, f"{_WHAT} {file}") if rows else "messages"


def require_enough(file: Path, found: Demonstrations, max_share: float) -> None:
    """Raises `UserError` when no row can be used, or more than `max_share` of them cannot."""
    total = found.rows + len(found.rejected)
    if found.rows and len(found.rejected) <= max_share * total:
        return
    reasons = "; ".join(found.describe()[:3])
    raise UserError(
        f"{_WHAT} {file}: {len(found.rejected):,} of {total:,} rows cannot be used: {reasons}; "
        "put them right or take them out"
    )


def find_source(file: Path, row: int, format: str) -> Dialogue | Continuation:
    """What a usable row of a file demonstrates."""
    found = next(each for number, each in read_rows(file, _WHAT) if number == row)
    assert isinstance(found, dict)
    return parse_row(found, format)


def write_rejections(rejected: Iterable[Rejection], file: Path) -> None:
    """Write {"row", "reason"} as JSON lines, in the order of the rows."""
    lines = (json.dumps({"row": each.row, "reason": each.reason}) for each in rejected)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def parse_demonstration(
    row: Row | str, format: str, special_tokens: Iterable[str], train_on: Sequence[str]
) -> Dialogue | Continuation | str:
    """What a row demonstrates, or why nothing."""
    if isinstance(row, str):
        return row
    try:
        found = parse_row(row, format)
    except UnusableError as error:
        return str(error)
    if isinstance(found, Dialogue):
        return find_fault(found.messages, special_tokens, train_on) or found
    return found


class _Reader:
    """Turns chunks of rows into examples and rejections, in order."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        format: str,
        train_on: tuple[str, ...],
        too_long: TooLong,
    ) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._format, self._train_on, self._too_long = format, train_on, too_long
        self._special = tuple(list_special_tokens(tokenizer))
        self.conversations: list[Conversation] = []
        self.rejected: list[Rejection] = []
        self.truncated = 0

    def add(self, chunk: Sequence[tuple[int, Row | str]]) -> None:
        for row, result in self._encode(chunk):
            fitted = result if isinstance(result, str) else self._fit(result)
            if isinstance(fitted, str):
                self.rejected.append(Rejection(row, fitted))
            else:
                self.conversations += [replace(each, row=row) for each in fitted]

    def _encode(
        self, chunk: Sequence[tuple[int, Row | str]]
    ) -> Iterator[tuple[int, list[Conversation] | str]]:
        """(row, examples or reason)."""
        parsed = [
            parse_demonstration(row, self._format, self._special, self._train_on)
            for _, row in chunk
        ]
        dialogues = [found for found in parsed if isinstance(found, Dialogue)]
        plain = [found for found in parsed if isinstance(found, Continuation)]
        if dialogues:
            require_chat_template(self._tokenizer, self._tokenizer.name_or_path)
        if plain and self._train_on != ("assistant",):
            raise UserError(
                f"train_on={', '.join(self._train_on)} has no effect on plain prompts and "
                "completions, which have no roles; leave it out, or give messages"
            )
        rendered = iter(encode_dialogues(dialogues, self._tokenizer, self._train_on))
        continued = iter(encode_continuations(plain, self._tokenizer))
        for (number, _), found in zip(chunk, parsed, strict=True):
            if isinstance(found, str):
                yield number, found
            elif isinstance(found, Dialogue):
                yield number, next(rendered)
            else:
                yield number, [next(continued)]

    def _fit(self, examples: list[Conversation]) -> list[Conversation] | str:
        """A row's examples cut or left out where they are too long, or why none is left."""
        long = [len(each.token_ids) > self._max_length for each in examples]
        if not any(long):
            return examples
        if self._too_long == "drop":
            return "longer than sequence_length"
        cut = [
            Conversation(each.token_ids[: self._max_length], each.trained[: self._max_length])
            for each in examples
        ]
        left = [each for each in cut if each.trained.any()]
        if not left:
            return "nothing to train within sequence_length"
        self.truncated += sum(long)
        return left
