"""Metrics that reduce exactly, and the places they go.

A metric is a pair (total, count): adding pairs over micro-batches, ranks or workers is exact, and
nobody needs to know which mean was meant.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
_STEP = re.compile(rb'\{"step": (\d+)[,}]')


@dataclass(frozen=True, slots=True)
class Metric:
    """A sum and how many things were summed."""

    total: float
    count: float = 1.0

    @property
    def mean(self) -> float:
        """total / count; NaN when nothing was counted."""
        return self.total / self.count if self.count else float("nan")

    def __add__(self, other: Metric) -> Metric:
        return Metric(self.total + other.total, self.count + other.count)


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Sum metrics of the same name."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name] + metric if name in merged else metric
    return merged


class Tracker(Protocol):
    """A place that metrics and events go."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def event(self, **fields: Any) -> None: ...

    def close(self) -> None: ...


class JsonTracker:
    """`metrics.jsonl` (one line a step) and `events.jsonl` (one line an event) in a directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._metrics = _append_lines(directory / METRICS_FILE)
        self._events = _append_lines(directory / EVENTS_FILE)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step, "time": time.time()} | {k: float(v) for k, v in values.items()}
        self._write(self._metrics, line)

    def event(self, **fields: Any) -> None:
        self._write(self._events, {"time": time.time()} | fields)

    def close(self) -> None:
        self._metrics.close()
        self._events.close()

    @staticmethod
    def _write(stream: IO[str], line: Mapping[str, Any]) -> None:
        stream.write(json.dumps(line, default=str) + "\n")
        stream.flush()


def _append_lines(file: Path) -> IO[str]:
    """Open for appending; a last line cut short by a kill is ended, lest it spoil the next one."""
    stream = file.open("a", encoding="utf-8")
    if stream.tell():
        with file.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read() != b"\n":
                stream.write("\n")
    return stream


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file (none if it does not exist) but for a line cut short by a kill."""
    return _parse_lines(file.read_bytes()) if file.is_file() else []


def _parse_lines(text: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    # Not text.splitlines(): a JSON string may hold U+2028 and its like, which that takes for ends.
    for line in text.split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def cut_lines(file: Path, step: int) -> None:
    """Remove the rows of `step` and later, and lines cut short, from a JSON-lines file, if there is
    one; whoever reads it sees it before or after. Raises `OSError`."""
    if not file.is_file():
        return
    draft = file.with_name(f".{file.name}")
    with file.open("rb") as written, draft.open("wb") as kept:
        # Line by line, and not all of each: a file of rollouts may be larger than the memory.
        for line in written:
            row = _STEP.match(line)
            number = int(row[1]) if row else _read_step(line)
            if number is not None and number < step and line.endswith(b"\n"):
                kept.write(line)
    os.replace(draft, file)


def _read_step(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


class GrowingLines:
    """Rows of a JSON-lines file that someone else is writing; each is read once.

    A file that was replaced, or cut, is read again from its start.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._rows: list[dict[str, Any]] = []
        self._inode = self._read = 0

    def read(self) -> list[dict[str, Any]]:
        """All rows so far, but for a last line that is not ended yet."""
        try:
            with self._file.open("rb") as stream:
                status = os.fstat(stream.fileno())
                if status.st_ino != self._inode or status.st_size < self._read:
                    self._rows, self._inode, self._read = [], status.st_ino, 0
                stream.seek(self._read)
                text = stream.read()
        except FileNotFoundError:
            self._rows, self._inode, self._read = [], 0, 0
            return self._rows
        ended = text[: text.rfind(b"\n") + 1]
        self._read += len(ended)
        self._rows += _parse_lines(ended)
        return self._rows


def append_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a JSON-lines file; what is not JSON is written as text. Raises `OSError`."""
    lines = [json.dumps(row, default=str) + "\n" for row in rows]
    with _append_lines(file) as stream:
        stream.writelines(lines)


class _RateColumn(TextColumn):
    """Units a second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        if not speed:
            return Text("")
        figure = f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
        return Text(f"{figure} {unit}/s", style="cyan")


class _Bars(Progress):
    """Bars, and below them whatever else is to be seen now."""

    below: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below is not None:
            yield self.below


class ProgressBoard:
    """One line a stage: bar, rate, time left and the numbers that matter now.

    On anything but a terminal it prints a plain line every `plain_every` seconds instead.
    """

    def __init__(self, console: Console | None = None, plain_every: float = 10.0) -> None:
        self.console = console or Console(stderr=True)
        self._live = self.console.is_terminal
        self._plain_every = plain_every
        self._bars = _Bars(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            disable=not self._live,
        )

    def __enter__(self) -> ProgressBoard:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def show(self, drawn: RenderableType) -> None:
        """A table, or the like, above the bars."""
        self.console.print(drawn, highlight=False)

    def pin(self, drawn: RenderableType | None) -> None:
        """Keep something in sight below the bars, in place of what was; on a terminal only."""
        self._bars.below = drawn
        self._bars.refresh()

    @contextmanager
    def bar(self, name: str, total: float | None, unit: str = "step") -> Iterator[Bar]:
        """A bar for the block; yields a `Bar`."""
        task = self._bars.add_task(name, total=total, unit=unit, note="")
        bar = Bar(self, task, name, total, unit)
        try:
            yield bar
        finally:
            bar.stop()

    def _update(self, task: TaskID, **fields: Any) -> None:
        self._bars.update(task, **fields)


class Bar:
    """A handle on one line of a `ProgressBoard`."""

    def __init__(
        self, board: ProgressBoard, task: TaskID, name: str, total: float | None, unit: str
    ) -> None:
        self._board, self._task, self._name, self._unit = board, task, name, unit
        self.show, self.pin = board.show, board.pin
        self.total, self._done, self._note = total, 0.0, ""
        self._started = self._printed = time.monotonic()

    def update(self, done: float, note: str = "", total: float | None = None) -> None:
        """`done` units in all, of `total` if that has become known."""
        self._done, self._note, self.total = done, note, total or self.total
        self._board._update(self._task, completed=done, note=note, total=self.total)
        if not self._board._live and time.monotonic() - self._printed > self._board._plain_every:
            self._printed = time.monotonic()
            self._print()

    def stop(self) -> None:
        self._board._bars.stop_task(self._task)
        if not self._board._live:
            self._print()

    def _print(self) -> None:
        seconds = time.monotonic() - self._started
        of = f"/{self.total:,.0f}" if self.total else ""
        left = ""
        if self.total and 0 < self._done < self.total:
            left = f", {seconds / self._done * (self.total - self._done):.0f} s left"
        rate = f"{self._done / seconds:,.2f} {self._unit}/s" if seconds > 0 else ""
        note = f"  {self._note}" if self._note else ""
        count = f"{self._done:,.0f}{of} {self._unit}s"
        self._board.say(f"{self._name}: {count}, {seconds:.0f} s{left}, {rate}{note}")
