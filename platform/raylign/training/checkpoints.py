"""Checkpoints of a worker group: whole or absent, newest found first, old ones removed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raylign.run import write_json

STATE = "progress.json"


class CheckpointStore:
    """Directories `step-NNNNNNNN` that all ranks write together, on storage that all see."""

    def __init__(self, root: Path, rank: int, barrier: Callable[[], None], keep: int = 2) -> None:
        self._root, self._rank, self._barrier, self._keep = root, rank, barrier, keep

    def save(self, step: int, write: Callable[[Path], None], progress: Mapping[str, Any]) -> None:
        """Let every rank `write` into one directory, then rename it into place. Collective.

        `progress` must be the same on every rank; the first one's is stored.
        """
        draft = self._root / f".step-{step:08d}.partial"
        if self._rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        self._barrier()
        write(draft)
        self._barrier()
        if self._rank == 0:
            sizes = {str(f.relative_to(draft)): f.stat().st_size for f in _list_files(draft)}
            write_json(draft / STATE, {"step": step, "files": sizes, "progress": dict(progress)})
            final = self._root / f"step-{step:08d}"
            shutil.rmtree(final, ignore_errors=True)
            os.rename(draft, final)
            for old in self._list()[: -self._keep]:
                shutil.rmtree(old)

    def latest(self) -> tuple[Path, int, dict[str, Any]] | None:
        """Directory, step and progress of the newest checkpoint whose files are all there."""
        for directory in reversed(self._list()):
            try:
                body = json.loads((directory / STATE).read_text(encoding="utf-8"))
                whole = all(
                    (directory / name).stat().st_size == size
                    for name, size in body["files"].items()
                )
            except (OSError, ValueError, KeyError):
                continue
            if whole:
                return directory, body["step"], body["progress"]
        return None

    def _list(self) -> list[Path]:
        return sorted(self._root.glob("step-*"))


def _list_files(directory: Path) -> list[Path]:
    return [file for file in directory.rglob("*") if file.is_file()]
