"""Saving beside training: ranks copy what they own and go on, threads write, the first rank's
thread makes a checkpoint of it when all parts are there.

Threads of different ranks meet in files only: a collective belongs to the thread that trains.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event as Flag
from typing import Any

import torch
from safetensors import SafetensorError

from raylign.run import hash_file, write_json
from raylign.training.checkpoints import (
    EXPORT,
    STATE,
    Checkpoint,
    Event,
    clear_drafts,
    commit,
    list_checkpoints,
    name_step,
    prune,
    sync,
)
from raylign.training.fragments import Fragment, Shelf, StoredState, write_part

POLL_S = 0.02
_PARTS = ".parts"


@dataclass(frozen=True, slots=True)
class Plan:
    """Who saves, and what for."""

    root: Path
    rank: int
    ranks: int
    attempt: str
    """Of the group: ranks of an earlier one that are still dying write elsewhere."""
    identity: dict[str, Any]
    keep: int
    asynchronous: bool
    timeout_s: float
    """Longest time in which no rank writes anything before a save is given up."""


class SaveError(RuntimeError):
    """A checkpoint could not be made; the reason, in words."""


class Saver:
    """One save at a time, of one rank. An error in it is an event, and training goes on."""

    def __init__(self, plan: Plan, export: Callable[[StoredState, Path], None]) -> None:
        """`export` writes what other tools load, from what was saved, on the first rank."""
        self._plan, self._export = plan, export
        self._shelf = Shelf()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._future: Future[list[Event]] | None = None
        self._written = Flag()
        self._written.set()
        self._events: list[Event] = []

    def save(self, step: int, fragments: Sequence[Fragment], progress: Mapping[str, Any]) -> None:
        """Begin; returns when the fragments may change, which is at once when they are copied and
        after `writing` has become false when not. Must not be called while `busy`."""
        assert not self.busy, "a save is in flight"
        self._collect()
        arrived = None
        if self._plan.asynchronous:
            fragments = self._shelf.copy(fragments)
            if torch.cuda.is_available():
                arrived = torch.cuda.Event()
                arrived.record()
        self._written.clear()
        self._future = self._pool.submit(self._run, step, fragments, dict(progress), arrived)

    @property
    def writing(self) -> bool:
        """Whether the last checkpoint is not yet one."""
        return not self._written.is_set()

    @property
    def busy(self) -> bool:
        """Whether anything is still done, removing old checkpoints included."""
        return self._future is not None and not self._future.done()

    def take_events(self) -> list[Event]:
        """What happened since the last call."""
        if not self.busy:
            self._collect()
        events, self._events = self._events, []
        return events

    def _collect(self) -> None:
        if self._future is not None:
            self._events += self._future.result()
            self._future = None

    def _run(
        self,
        step: int,
        fragments: Sequence[Fragment],
        progress: dict[str, Any],
        arrived: torch.cuda.Event | None,
    ) -> list[Event]:
        started, plan = time.monotonic(), self._plan
        draft = plan.root / f".{name_step(step)}.{plan.attempt}.partial"
        try:
            if arrived is not None:
                arrived.synchronize()
            self._write(draft, fragments)
            if plan.rank > 0:
                return []
            size = self._finish(draft, step, progress)
            self._written.set()
            seconds = round(time.monotonic() - started, 3)
            saved = {"what": "checkpoint", "step": step, "bytes": size, "seconds": seconds}
            return [saved, *prune(plan.root, plan.keep)]
        except (OSError, SafetensorError, SaveError) as error:
            return self._give_up(draft, step, _explain(error))
        finally:
            self._written.set()

    def _write(self, draft: Path, fragments: Sequence[Fragment]) -> None:
        """This rank's part, and a note that it is there."""
        plan = self._plan
        if plan.rank == 0:
            clear_drafts(plan.root, draft)  # other ranks may be writing there already
        name = f"rank-{plan.rank:05d}"
        parts = draft / _PARTS
        for directory in (draft / STATE, parts):
            directory.mkdir(parents=True, exist_ok=True)
        try:
            files = {}
            if fragments:
                file = draft / STATE / f"{name}.safetensors"
                files[f"{STATE}/{file.name}"] = write_part(fragments, file)
            write_json(parts / f"{name}.json", files)
        except OSError as error:
            # An empty file may find room where nothing else does.
            (parts / f"{name}.failed").touch()
            (parts / f"{name}.failed").write_text(_explain(error), encoding="utf-8")
            raise

    def _finish(self, draft: Path, step: int, progress: dict[str, Any]) -> int:
        """Wait for all parts, add what other tools load, and commit; bytes of the checkpoint."""
        plan = self._plan
        files = self._await_parts(draft)
        shutil.rmtree(draft / _PARTS)
        self._export(StoredState(draft / STATE), draft / EXPORT)
        for file in sorted(path for path in (draft / EXPORT).rglob("*") if path.is_file()):
            sync(file)
            name = str(file.relative_to(draft))
            files[name] = {"size": file.stat().st_size, "sha256": hash_file(file)}
        checkpoint = Checkpoint(step, plan.identity, progress, plan.ranks, files)
        commit(draft, plan.root, checkpoint)
        return sum(file["size"] for file in files.values())

    def _await_parts(self, draft: Path) -> dict[str, dict[str, Any]]:
        """Files of all ranks. Raises `SaveError` when one failed, or nothing is written."""
        parts, ranks = draft / _PARTS, self._plan.ranks
        written, since = -1, time.monotonic()
        while True:
            for failed in sorted(parts.glob("*.failed")):
                reason = failed.read_text(encoding="utf-8") or "no reason given"
                raise SaveError(f"{failed.stem} could not write: {reason}")
            found = sorted(parts.glob("rank-*.json"))
            if len(found) == ranks:
                break
            size = sum(file.stat().st_size for file in (draft / STATE).iterdir())
            if size != written:
                written, since = size, time.monotonic()
            if time.monotonic() - since > self._plan.timeout_s:
                there = {file.stem for file in found}
                names = (f"rank-{rank:05d}" for rank in range(ranks))
                missing = ", ".join(name for name in names if name not in there)
                raise SaveError(f"{missing} wrote nothing for {self._plan.timeout_s:g} s")
            time.sleep(POLL_S)
        files: dict[str, dict[str, Any]] = {}
        for file in found:
            files |= json.loads(file.read_text(encoding="utf-8"))
        return files

    def _give_up(self, draft: Path, step: int, reason: str) -> list[Event]:
        """The draft goes, what was there stays."""
        if self._plan.rank > 0:
            return []  # the first rank says it
        shutil.rmtree(draft, ignore_errors=True)
        kept = list_checkpoints(self._plan.root)
        newest = kept[-1].name if kept else None
        return [{"what": "checkpoint_failed", "step": step, "reason": reason, "kept": newest}]


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
