"""What a run leaves on disk on its way, and where one that died goes on from.

A checkpoint holds the learner and the controller's `progress`; batches that were learned from since
are applied to it again, in order, which gives the same weights to the bit; groups that were scored
and not yet learned from are taken as they are. Nothing is sampled twice.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.buffer import Group
from actors.ledger import NOTHING_SETTLED
from raylign.rewards.outcomes import Rejection
from raylign.run import write_json
from raylign.training.batches import BatchFiles, LearnerBatch, read_batch, write_batch
from raylign.training.checkpoints import (
    DamageError,
    Event,
    find_newest,
    list_checkpoints,
    read_manifest,
)
from raylign.training.loop import CHECKPOINTS

BATCHES = ".batches"
GROUPS = ".groups"
BRANCH = ".branch.json"


@dataclass(frozen=True, slots=True)
class Branch:
    """What rollbacks have changed for all steps that follow."""

    attempt: int = 0
    """Rollbacks so far; other attempts draw other samples."""
    shift: int = 0
    """Policy version minus step: versions only grow, steps begin again."""
    rate: float = 1.0
    """Factor of the learning rates."""
    undone: int = 0
    """Completions whose learning was undone."""


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """Where to go on from."""

    checkpoint: Path | None
    step: int
    """That the checkpoint was made after; 0 without one."""
    progress: dict[str, Any]
    batches: list[LearnerBatch]
    """To be applied to it again."""
    branch: Branch
    events: list[Event]
    """What was found damaged."""


class RunFiles:
    """The directory of a stage in the making."""

    def __init__(self, stage: Path) -> None:
        self.stage = stage
        self.checkpoints = stage / CHECKPOINTS
        self.batches = BatchFiles(stage / BATCHES)
        self._groups = stage / GROUPS
        self._known: set[str] | None = None
        """Files of groups that an earlier attempt had made."""

    def find_start(self) -> Start:
        """The newest checkpoint that is whole, and the batches after it."""
        branch = self.read_branch()
        found, events = find_newest(self.checkpoints)
        path, step, progress = None, 0, {}
        if found is not None:
            path, checkpoint = found
            progress = checkpoint.progress
            step = progress["step"]
        return Start(path, step, progress, self.batches.read_from(step), branch, events)

    def last_good(self, before: int) -> int:
        """Step of the newest checkpoint made at or before step `before`; 0 is the beginning."""
        return max((step for step in self._steps().values() if step <= before), default=0)

    def settled_at(self, step: int) -> dict[str, Any]:
        """The books as the checkpoint of `step` has them."""
        for path, made in self._steps().items():
            if made == step:
                books: dict[str, Any] = read_manifest(path).progress["ledger"]
                return books
        return dict(NOTHING_SETTLED)

    def forget_covered(self) -> None:
        """Remove batches that the oldest checkpoint covers. Those between two checkpoints stay: if
        the newer one is damaged, nothing is lost."""
        if steps := self._steps():
            self.batches.remove_below(min(steps.values()))

    def _steps(self) -> dict[Path, int]:
        """The step that each checkpoint was made after; its name is its policy version. One whose
        manifest cannot be read is left to `find_newest`."""
        found = {}
        for path in list_checkpoints(self.checkpoints):
            with suppress(DamageError):
                found[path] = int(read_manifest(path).progress["step"])
        return found

    def roll_back(self, step: int, branch: Branch) -> None:
        """Forget everything after `step`. The branch is written first: were this killed midway,
        `find_start` would finish it."""
        write_json(self.stage / BRANCH, asdict(branch) | {"step": step})
        self.forget_after(step)

    def forget_after(self, step: int) -> None:
        """Remove checkpoints after `step`, batches and groups from it on."""
        for path, made in self._steps().items():
            if made > step:
                os.rename(path, path.with_name(f"rolled-back-{path.name}"))
        self.batches.remove_from(step)
        for file in self._groups.glob("*.safetensors"):
            file.unlink()

    def read_branch(self) -> Branch:
        """What rollbacks have left; also finishes one that was interrupted."""
        file = self.stage / BRANCH
        if not file.is_file():
            return Branch()
        body = json.loads(file.read_text(encoding="utf-8"))
        step = body.pop("step")
        if step is not None:
            self.forget_after(step)
        return Branch(**body)

    def settle_branch(self, branch: Branch) -> None:
        """The rollback is over: what comes now is not to be forgotten."""
        write_json(self.stage / BRANCH, asdict(branch) | {"step": None})

    def keep_group(self, step: int, group: Group) -> None:
        """Keep a scored group until its step is learned."""
        seen = [r.trajectory for r in group.rejected if r.trajectory is not None]
        rejected = [
            [r.prompt_id, r.group_id, r.reason, r.detail, r.trajectory is not None]
            for r in group.rejected
        ]
        record = {"request": group.request, "rejected": rejected}
        every = (*group.trajectories, *seen)
        self._groups.mkdir(exist_ok=True)
        batch = LearnerBatch(step, every, (0,) * len(every), {}, record)
        write_batch(self._file(group.request), batch, flush=False)

    def may_know(self, request: str) -> bool:
        """Whether `take_group` is worth asking: costs no look at the disk but the first time."""
        if self._known is None:
            self._known = {file.name for file in self._groups.glob("*.safetensors")}
        return self._file(request).name in self._known

    def take_group(self, request: str) -> Group | None:
        """The group of a request if it was made before; None when not, or damaged."""
        file = self._file(request)
        batch = read_batch(file) if file.is_file() else None
        if batch is None:
            return None
        listed = batch.record["rejected"]
        kept = len(batch.trajectories) - sum(seen for *_, seen in listed)
        others = iter(batch.trajectories[kept:])
        rejected = tuple(
            Rejection(prompt, group, reason, detail, next(others) if seen else None)
            for prompt, group, reason, detail, seen in listed
        )
        return Group(batch.trajectories[:kept], rejected, request)

    def drop_groups(self, step: int) -> None:
        """The groups of `step` are in its batch now."""
        for file in self._groups.glob(f"{step}-*.safetensors"):
            file.unlink()

    def _file(self, request: str) -> Path:
        return self._groups / f"{request.replace('/', '-')}.safetensors"


def next_branch(branch: Branch, version: int, step: int, undone: int) -> Branch:
    """After a rollback from policy `version` to `step`: the next version is a new one. `undone`:
    completions in all whose learning was undone."""
    attempt, shift = branch.attempt + 1, version + 1 - step
    return Branch(attempt=attempt, shift=shift, rate=branch.rate / 2, undone=undone)
