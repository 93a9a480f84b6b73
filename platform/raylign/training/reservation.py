"""Resources that a group of ranks holds, given back when what started the group is gone.

Ray keeps a placement group until both the actor and the job that made it have ended. A search is
one job, and stops, pauses and copies trials by ending their actors, so that each of those would
leave its ranks' share of the machine taken. (Ray Train 2.60 has an actor to clean up; it asks the
dashboard, which private clusters do not have.) So ranks note what they are placed in, and whoever
ends a trial, or starts it again, gives it back.
"""

from __future__ import annotations

import os
from pathlib import Path

import ray
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group

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
        identity = PlacementGroupID(bytes.fromhex(note.name.removesuffix(_SUFFIX)))
        remove_placement_group(PlacementGroup(identity))
        note.unlink(missing_ok=True)
    return len(notes)
