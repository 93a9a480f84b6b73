"""Disk space: how much a stage still needs, and what is said when there is none left."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from raylign.config import UserError
from raylign.runtime import is_full
from raylign.training.checkpoints import list_checkpoints

_FULL = re.compile(r"os error (28|122)\b|No space left|quota exceeded", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a stage writes in all, in bytes."""

    checkpoint: int
    """Of each checkpoint."""
    final: int
    """Of what is exported at the end."""
    saves: int
    """Checkpoints that there will be."""
    keep: int

    @property
    def held(self) -> int:
        """Checkpoints that are there at once: one more than `keep` while the oldest is not yet
        removed."""
        return min(self.saves, self.keep + 1)

    def missing(self, root: Path) -> int:
        """Bytes still to be written beside the checkpoints in `root`, beyond those that the disk
        has free; negative where there is room. Damaged ones are never removed and make none."""
        present = sum(_measure(path) for path in list_checkpoints(root))
        needed = self.checkpoint * self.held + self.final - present
        return needed - shutil.disk_usage(root).free


def require_room(root: Path, demand: Demand, name: str) -> None:
    """Raises `UserError` when the disk has no room for what the stage `name` will write."""
    missing = demand.missing(root)
    if missing <= 0:
        return
    free = shutil.disk_usage(root).free
    raise UserError(
        f"{name} needs {in_words(missing + free)} in {root.parent} ({demand.held} checkpoints of "
        f"{in_words(demand.checkpoint)} and {in_words(demand.final)} at the end) and the disk has "
        f"{in_words(free)} free; free some, lower {name}.checkpoints.keep or raise "
        f"{name}.checkpoint_every"
    )


def is_out_of_room(error: BaseException) -> bool:
    """Whether a disk or a quota was full, whoever says so."""
    if isinstance(error, OSError):
        return is_full(error)
    return isinstance(error, SafetensorError) and bool(_FULL.search(str(error)))


def explain_full(name: str, root: Path, demand: Demand | None = None) -> str:
    """One line for the user about a stage that was stopped by a full disk. root: its checkpoints.
    demand: where it is known."""
    found = list_checkpoints(root)
    kept = f"the newest checkpoint, {found[-1].name}, is kept" if found else "no checkpoint is kept"
    missing = demand.missing(root) if demand is not None and root.is_dir() else 0
    amount = f"{in_words(missing)} more" if missing > 0 else "some"
    return f"{name}: no space left in {root.parent}; {kept}; free {amount} and run again"


def in_words(size: int) -> str:
    """Bytes as GiB, MiB or KiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 2**10:.0f} KiB"


def _measure(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
