"""The files, sinks and terminal of reinforcement learning: `actors.journal.Journal` in full.

    events.jsonl     what every actor did, from when to when, and what befell it
    metrics.jsonl    one row a step
    rollouts.jsonl   one row a completion, learned from or not; see `jobs.align_rows`
    examples.jsonl   a few groups, every `every` steps

All of it is written on a thread of its own. What finds no room there, or cannot be written, is
counted, and the run goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.text import Text

from actors.buffer import Group
from actors.learner import LearnerReport
from jobs.align_panel import draw_panel, note_step, tabulate_steps
from jobs.align_rows import Spell, list_examples, list_rollouts, list_unlearned, undo_rows
from raylign.outbox import Outbox
from raylign.records import Prompt
from raylign.sinks import GuardedSink, Sink
from raylign.tracking import (
    EVENTS_FILE,
    METRICS_FILE,
    Bar,
    append_rows,
    cut_lines,
    read_lines,
)
from raylign.training.batches import LearnerBatch

log = logging.getLogger(__name__)

ROLLOUTS_FILE = "rollouts.jsonl"
EXAMPLES_FILE = "examples.jsonl"
CAPACITY = 10_000
CLOSE_S, SCREEN_S = 60.0, 5.0
SCREEN_CAPACITY = 64
# What every actor does all the time; the rest is news.
ROUTINE = frozenset({"generate", "score", "learn", "wait", "sync", "save"})


class AlignJournal:
    """Takes everything in, and neither fails nor waits; `close` it at the end."""

    def __init__(
        self,
        directory: Path,
        bar: Bar,
        prompts: Mapping[str, Prompt],
        sinks: Sequence[Sink] = (),
        every: int = 5,
        spell: Spell | None = None,
        capacity: int = CAPACITY,
    ) -> None:
        """every: steps between examples, and between completions token by token, for which `spell`
        gives the text of each token. capacity: events and completions that may wait to be written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._bar, self._prompts = directory, bar, prompts
        self._every, self._spell = every, spell
        self._rows = read_lines(
            directory / METRICS_FILE
        )  # of an attempt that this one goes on with
        self._news = ""
        self._told: float | None = None
        self._failed = 0
        self._outbox = Outbox("journal", capacity, self._fail)
        self._screen = Outbox("screen", SCREEN_CAPACITY, self._ignore)
        self._sinks = [GuardedSink(sink, self._warn) for sink in sinks]

    def event(self, **fields: Any) -> None:
        """A row of events.jsonl, with the time of this call."""
        row = {"time": time.time()} | fields
        self._outbox.put(partial(self._write, EVENTS_FILE, [row]))
        what = fields.get("what")
        if what not in ROUTINE:
            told = (fields.get(key) for key in ("actor", "what", "action", "reason", "text"))
            self._news = " ".join(str(part) for part in told if part is not None)[:160]
            self._show()
            if what == "collapse":  # the next news must not hide it
                line = Text(f"step {fields['step']}: {self._news}", style="yellow")
                self._screen.put(partial(self._bar.show, line), needed=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row of metrics.jsonl, for the sinks too, and for whoever watches."""
        values = {name: float(value) for name, value in metrics.items()}
        now, seconds = time.time(), values.get("step_seconds", 0.0)
        if self._told is not None:  # with what was done between two steps, such as a checkpoint
            seconds = max(seconds, now - self._told) if seconds else 0.0
        self._told = now
        if seconds > 0 and "sampled_tokens" in values:
            values.setdefault("tokens_per_second", values["sampled_tokens"] / seconds)
        row = {"step": step, "time": now} | values
        self._rows.append(row)
        self._outbox.put(partial(self._write, METRICS_FILE, [row]))
        for sink in self._sinks:
            sink.log(step, values)
        self._show()

    def rollouts(
        self,
        step: int,
        version: int,
        groups: Sequence[Group],
        batch: LearnerBatch,
        report: LearnerReport,
    ) -> None:
        """Rows of rollouts.jsonl and, every so many steps, of examples.jsonl."""
        last = self._bar.total is not None and step == int(self._bar.total) - 1
        spell = self._spell if step % self._every == 0 or last else None

        def write() -> None:
            rows = list_rollouts(step, version, groups, batch, report, self._prompts, spell)
            self._write(ROLLOUTS_FILE, rows)
            if step % self._every == 0 or last:
                self._write(EXAMPLES_FILE, list_examples(step, groups, self._prompts))

        self._outbox.put(write, weight=max(1, sum(len(group.trajectories) for group in groups)))

    def unlearned(self, step: int, version: int, groups: Sequence[Group], reason: str) -> None:
        """Rows of rollouts.jsonl."""

        def write() -> None:
            rows = list_unlearned(step, version, groups, reason, self._prompts)
            self._write(ROLLOUTS_FILE, rows)

        self._outbox.put(write, weight=max(1, sum(len(group.trajectories) for group in groups)))

    @property
    def last_step(self) -> int:
        return int(self._rows[-1]["step"]) if self._rows else -1

    def rewind(self, step: int, undone: str = "") -> None:
        """Rows of `step` and later are removed, but for events: those have happened. Completions
        that are `undone` for a reason stay, with it."""
        heard = step or self._rows
        self._rows = [row for row in self._rows if int(row["step"]) < step]
        self._told = None
        for name in (METRICS_FILE, EXAMPLES_FILE):
            self._outbox.put(partial(cut_lines, self._directory / name, step), needed=True)
        undo = partial(undo_rows, self._directory / ROLLOUTS_FILE, step, undone)
        self._outbox.put(undo, needed=True)
        for sink in self._sinks if heard else ():
            sink.rewind(step)
        self._show()

    @property
    def summary(self) -> dict[str, float]:
        """Numbers of the whole run for its manifest."""
        if not self._rows:
            return {}
        rewards = [row.get("reward/total", 0.0) for row in self._rows]
        found = {
            "steps": self._rows[-1]["step"] + 1,
            "reward_first": rewards[0],
            "reward_last": rewards[-1],
            "mismatch_worst": max(row.get("mismatch/mean_abs", 0.0) for row in self._rows),
        }
        for row in self._rows:
            for name, value in row.items():
                if name in ("samples", "sampled_tokens") or name.startswith("dropped/"):
                    found[name] = found.get(name, 0) + value
        lost = self._outbox.lost + self._failed
        return found | ({"journal_lost": lost} if lost else {})

    def close(self) -> None:
        """Write what is left, and show the last steps."""
        for sink in self._sinks:
            sink.close()
        lost = self._outbox.lost
        if lost:
            self.event(what="journal_lost", reason=f"{lost} rows found no room")
        if not self._outbox.close(CLOSE_S):
            log.warning("%s could not be written within %.0f s", self._directory, CLOSE_S)
        self._screen.put(partial(self._draw_last, list(self._rows)), needed=True)
        self._screen.close(SCREEN_S)

    def _show(self) -> None:
        """On the terminal, some time soon: one that is held up, or gone, holds up nothing."""
        if self._rows:
            self._screen.put(partial(self._draw, self._rows[-1], self._news))

    def _draw(self, row: Mapping[str, Any], news: str) -> None:
        self._bar.pin(draw_panel(row, news))
        self._bar.update(row["step"] + 1, note_step(row))

    def _draw_last(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._bar.pin(None)
        if rows:
            self._bar.show(tabulate_steps(rows))

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        append_rows(self._directory / name, rows)

    def _fail(self, error: Exception) -> None:
        self._failed += 1
        if self._failed == 1:
            log.warning("%s: %s: %s", self._directory, type(error).__name__, error)

    def _ignore(self, error: Exception) -> None:
        log.debug("%s could not be shown: %s", self._directory, error)

    def _warn(self, sink: str, reason: str) -> None:
        log.warning("%s is off for the rest of the run: %s", sink, reason)
        self._outbox.put(
            partial(
                self._write,
                EVENTS_FILE,
                [{"time": time.time(), "what": "sink_off", "sink": sink, "reason": reason}],
            )
        )
