"""From a file of judgements to comparisons: what is used, what is not, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from raylign.config import UserError
from raylign.data.chat.reading import Rejection
from raylign.data.comparisons.encoding import Compared, encode_judgements, part, shorten
from raylign.data.instructions import UnusableError
from raylign.data.preferences import (
    FORMATS,
    Judgement,
    Kind,
    parse_judgement,
    recognise,
    require_format,
)
from raylign.data.rows import read_rows

_CHUNK = 512
# So many rows tell which columns a file has.
_PEEKED = 20
_WHAT = "comparisons"

TooLong = Literal["drop", "truncate"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a stage can learn from."""

    kind: Kind
    """`labelled` takes pairs too, as a good answer and a bad one each."""
    key: str
    """The recipe's section, as in messages to the user."""
    max_length: int
    """Tokens of prompt and answer together."""
    too_long: TooLong = "drop"
    format: str = "auto"
    separator: str = "\n"
    """What closes a step."""


@dataclass(frozen=True, slots=True, eq=False)
class Comparisons:
    """The usable rows of a file, in order, and the others."""

    items: list[Compared]
    """A pair gives two where labelled answers were wanted."""
    rejected: list[Rejection]
    format: str
    rows: int
    """Usable ones."""
    truncated: int = 0
    """Rows that were cut."""

    def describe(self) -> list[str]:
        """A line for every reason of rejection, the most frequent first, with its first row."""
        first = {rejection.reason: rejection.row for rejection in reversed(self.rejected)}
        counts = Counter(rejection.reason for rejection in self.rejected)
        return [f"{n:,} x {why} (first in row {first[why]})" for why, n in counts.most_common()]


def read_comparisons(file: Path, tokenizer: PreTrainedTokenizerBase, wanted: Wanted) -> Comparisons:
    """Comparisons of a file of JSON lines, a JSON array or Parquet, as tokens.

    Unusable rows are counted with their reason; `require_enough` judges their number. Raises
    `UserError` when there is no such file, its columns are of no format or not of the wanted kind,
    or a chat template is needed and missing.
    """
    format = _choose_format(file, wanted)
    reader = _Reader(file, tokenizer, wanted, format)
    rows = read_rows(file, _WHAT)
    while chunk := list(islice(rows, _CHUNK)):
        reader.add(chunk)
    return Comparisons(reader.items, reader.rejected, format, reader.rows, reader.truncated)


def require_enough(file: Path, found: Comparisons, max_share: float, key: str) -> None:
    """Raises `UserError`, naming the recipe's `key`, when no row can be used, or more than
    `max_share` of them cannot."""
    total = found.rows + len(found.rejected)
    if found.rows and len(found.rejected) <= max_share * total:
        return
    raise UserError(
        f"{_WHAT} {file}: {len(found.rejected):,} of {total:,} rows cannot be used: "
        f"{'; '.join(found.describe()[:3])}; put them right, take them out, or raise "
        f"{key}.max_rejected_share"
    )


def write_rejections(rejected: Sequence[Rejection], file: Path) -> None:
    """Write {"row", "reason"} as JSON lines, in the order of the rows."""
    lines = (json.dumps({"row": each.row, "reason": each.reason}) for each in rejected)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _choose_format(file: Path, wanted: Wanted) -> str:
    format = require_format(wanted.format, f"{wanted.key}.format")
    first = [row for _, row in islice(read_rows(file, _WHAT), _PEEKED)]
    if not first:
        raise UserError(f"{_WHAT} {file} are empty; give rows with `chosen` and `rejected`")
    if format == "auto":
        rows = [row for row in first if isinstance(row, dict)]
        format = recognise(rows, f"{_WHAT} {file}", f"{wanted.key}.format")
    kind = FORMATS[format].kind
    if kind != wanted.kind and (kind, wanted.kind) != ("pairs", "labelled"):
        raise UserError(f"{_WHAT} {file} ({format}) {_REMEDIES[wanted.key][kind]}")
    return format


# What a stage says when it is given another kind of data than it asked for.
_REMEDIES: dict[str, dict[Kind, str]] = {
    "preference": {
        "pairs": "are pairs; choose preference.loss=dpo",
        "labelled": "are labelled answers, not pairs; choose preference.loss=kto",
        "steps": "are labelled steps; train reward_model.kind=process on them",
    },
    "reward_model": {
        "pairs": "are pairs; choose reward_model.kind=pairs, or outcome",
        "labelled": "are labelled answers; choose reward_model.kind=outcome",
        "steps": "are labelled steps; choose reward_model.kind=process",
    },
}


class _Reader:
    """Turns chunks of rows into comparisons and rejections, in order."""

    def __init__(
        self, file: Path, tokenizer: PreTrainedTokenizerBase, wanted: Wanted, format: str
    ) -> None:
        self._file, self._tokenizer = file, tokenizer
        self._wanted, self._format = wanted, format
        self.items: list[Compared] = []
        self.rejected: list[Rejection] = []
        self.rows = self.truncated = 0

    def add(self, chunk: Sequence[tuple[int, dict[str, Any] | str]]) -> None:
        parsed = [self._parse(row) for _, row in chunk]
        sound = [each for each in parsed if not isinstance(each, str)]
        self._require_template(sound)
        encoded = iter(encode_judgements(sound, self._tokenizer, self._wanted.separator))
        for (number, _), each in zip(chunk, parsed, strict=True):
            found = self._fit(each if isinstance(each, str) else next(encoded))
            if isinstance(found, str):
                self.rejected.append(Rejection(number, found))
            else:
                self.rows += 1
                items = part(found) if self._wanted.kind == "labelled" else [found]
                self.items += [replace(item, row=number) for item in items]

    def _parse(self, row: dict[str, Any] | str) -> Judgement | str:
        if isinstance(row, str):
            return row
        try:
            return parse_judgement(row, self._format)
        except UnusableError as error:
            return str(error)

    def _fit(self, found: Compared | str) -> Compared | str:
        if isinstance(found, str) or found.longest <= self._wanted.max_length:
            return found
        if self._wanted.too_long == "drop":
            return "longer than max_length"
        cut = shorten(found, self._wanted.max_length, self._tokenizer.bos_token_id)
        self.truncated += not isinstance(cut, str)
        return cut

    def _require_template(self, judgements: Sequence[Judgement]) -> None:
        if self._tokenizer.chat_template or all(isinstance(j.prompt, str) for j in judgements):
            return
        other = "; format=implicit-pairs reads the same rows as plain text"
        raise UserError(
            f"{_WHAT} {self._file} are conversations, and the model's tokenizer has no chat "
            f"template; add chat_template.jinja to it{other if self._format == 'hh' else ''}"
        )
