"""Answers of a model, and the store that keeps those already paid for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from raylign.config import UserError
from raylign.run import hash_json

_PREFIX = b'{"key": "'
_DIGITS = 32


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion."""

    text: str
    finish_reason: str
    """`stop`, `length`, or why there is no whole answer."""
    tokens: int
    """Sampled tokens."""
    version: int
    """Version of the weights that sampled it."""


def request_key(model: str, sampling: dict[str, Any], token_ids: Sequence[int], sample: int) -> str:
    """32 hexadecimal digits that depend on everything an answer depends on: content hash of the
    model, sampling parameters with the seed, prompt tokens, and which sample it is."""
    parts = {"model": model, "sampling": sampling, "prompt": list(token_ids), "sample": sample}
    return hash_json(parts)[:_DIGITS]


class AnswerCache:
    """Answers by key, in JSON-lines files of a directory.

    Every answer is written as soon as it is there; a process that is killed loses at most the line
    it was writing, which is not read. Files are only ever appended to by the process that made
    them. In memory are the keys and where their answers stand.
    """

    def __init__(self, directory: Path) -> None:
        """Raises `UserError` when the directory cannot be made or read."""
        self._directory = directory
        self._places: dict[bytes, tuple[int, int]] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._files = [file.open("rb") for file in sorted(directory.glob("answers-*.jsonl"))]
            for number, file in enumerate(self._files):
                self._index(number, file)
        except OSError as error:
            raise UserError(
                f"cache {directory} cannot be used ({error.strerror}); choose another directory"
            ) from None
        self._own: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self._places)

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.close()
        if self._own is not None:
            self._own.close()

    def get(self, key: str) -> Answer | None:
        """The answer kept for `key`; None when there is none, or its line is damaged."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        file = self._files[place[0]]
        file.seek(place[1])
        try:
            row = json.loads(file.readline())
            if row.pop("key") != key:
                return None
            return Answer(**row)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer; it is in the file when this returns."""
        if self._own is None:
            self._own = self._create()
        place = self._own.tell()
        row = {"key": key} | asdict(answer)
        self._own.write(json.dumps(row).encode() + b"\n")
        self._own.flush()
        self._places[bytes.fromhex(key)] = (len(self._files) - 1, place)

    def _create(self) -> BinaryIO:
        number = len(self._files)
        while True:
            file = self._directory / f"answers-{number:05d}.jsonl"
            try:
                own = file.open("xb")
            except FileExistsError:  # another run writes here too
                number += 1
                continue
            self._files.append(file.open("rb"))
            return own

    def _index(self, number: int, file: BinaryIO) -> None:
        place = 0
        for line in file:
            key = line[len(_PREFIX) : len(_PREFIX) + _DIGITS]
            if line.startswith(_PREFIX) and line.endswith(b"}\n"):
                with suppress(ValueError):  # not a key
                    self._places[bytes.fromhex(key.decode())] = (number, place)
            place += len(line)
