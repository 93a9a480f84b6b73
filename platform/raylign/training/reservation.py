"""Resources that a group of ranks holds, given back when what started the group is gone.

Ray keeps a placement group until both the actor and the job that made it have ended. A search is
one job, and stops, pauses and copies trials by ending their actors, so that each of those would
leave its ranks' share of the machine taken. (Ray Train 2.60 has an actor to clean up; it asks the
dashboard, which private clusters do not have.) So ranks note what they are placed in, and whoever
ends a trial, or starts it again, gives it back. Those that were ended before they had noted it hold
what nobody runs in, and give it back when somebody waits for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

PATIENCE_S = 20.0
"""How long a group may hold what nothing runs in: longer than a rank's process takes to start."""
_SUFFIX = ".placement"


def note_reservation(directory: Path) -> None:
    """Leave a note in `directory` of the placement group that this process runs in, if any."""
    group = ray.util.get_current_placement_group()
    if group is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{group.id.hex()}{_SUFFIX}").touch()


def release_reservations(directory: Path) -> int:
    """Remove the placement groups noted anywhere below `directory`, and what runs in them; how many
    there were. Those that are gone already are no mistake."""
    notes = [
        Path(folder) / name
        for folder, _, names in os.walk(directory)
        for name in names
        if name.endswith(_SUFFIX)
    ]
    for note in notes:
        _remove(note.name.removesuffix(_SUFFIX))
        note.unlink(missing_ok=True)
    return len(notes)


def list_reservations() -> dict[str, dict[str, Any]]:
    """What Ray knows of this job's placement groups that have not been removed."""
    job = ray.get_runtime_context().get_job_id()  # the last bytes of an identity
    groups = placement_group_table().items()
    return {k: v for k, v in groups if k.endswith(job) and v["state"] != "REMOVED"}


@contextmanager
def release_afterwards() -> Iterator[None]:
    """Remove whatever groups of this job were made during the block and are still there."""
    before = list_reservations().keys()
    try:
        yield
    finally:
        for key in list_reservations().keys() - before:
            _remove(key)


class IdleReservations:
    """This job's placement groups in which nothing has run for a while."""

    def __init__(self, patience_s: float = PATIENCE_S, look_s: float = 2.0) -> None:
        self._patience_s, self._look_s = patience_s, look_s
        self._idle: dict[str, float] = {}
        self._looked = 0.0
        self.waiting = False
        """Whether a group of this job waited for resources at the last look."""

    def release(self) -> int:
        """Remove those that were idle at every look for `patience_s`, if another group of this job
        waits for resources; how many. Looks every `look_s` at most, however often it is called."""
        now = time.monotonic()
        if now - self._looked < self._look_s:
            return 0
        self._looked = now
        mine, free = list_reservations(), ray.available_resources()
        self._idle = {
            key: self._idle.get(key, now)
            for key, group in mine.items()
            if group["state"] == "CREATED" and _is_idle(key, group["bundles"], free)
        }
        self.waiting = any(group["state"] == "PENDING" for group in mine.values())
        if not self.waiting:
            return 0
        late = [key for key, since in self._idle.items() if now - since >= self._patience_s]
        for key in late:
            _remove(key)
        return len(late)


def _is_idle(key: str, bundles: dict[int, dict[str, float]], free: dict[str, float]) -> bool:
    """Whether all that a group has reserved is free within it."""
    wanted: dict[str, float] = {}
    for bundle in bundles.values():
        for name, amount in bundle.items():
            wanted[name] = wanted.get(name, 0.0) + amount
    return all(
        free.get(f"{name}_group_{key}", 0.0) > amount - 1e-6 for name, amount in wanted.items()
    )


def _remove(key: str) -> None:
    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(key))))
