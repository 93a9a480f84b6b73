"""What a group of ranks holds is given back after whoever started it was killed, on real Ray."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylign.training.reservation import (
    IdleReservations,
    list_reservations,
    note_reservation,
    release_afterwards,
    release_reservations,
)


@ray.remote(num_cpus=0)
class Owner:
    """Reserves a core, and may run something in it."""

    def reserve(self, notes: Path | None) -> str:
        self.group = placement_group([{"CPU": 1.0}])
        ray.get(self.group.ready(), timeout=60)
        if notes is not None:
            place = PlacementGroupSchedulingStrategy(self.group)
            self.rank = Rank.options(num_cpus=1, scheduling_strategy=place).remote()
            ray.get(self.rank.note.remote(notes), timeout=60)
        return self.group.id.hex()

    def give_back(self) -> None:
        remove_placement_group(self.group)


@ray.remote
class Rank:
    def note(self, notes: Path) -> None:
        note_reservation(notes / "deep" / "below")


def begin(notes: Path | None = None) -> tuple[Any, str]:
    owner = Owner.remote()
    return owner, ray.get(owner.reserve.remote(notes), timeout=90)


def read_state(key: str) -> str:
    return str(placement_group_table()[key]["state"])


@pytest.mark.slow
def test_what_killed_trials_held_is_given_back(ray_cluster: None, tmp_path: Path) -> None:
    owner, noted = begin(tmp_path)
    ray.kill(owner)
    time.sleep(1)
    assert read_state(noted) == "CREATED", "which is why all this is needed"
    assert release_reservations(tmp_path) == 1 and release_reservations(tmp_path) == 0
    idle = IdleReservations(patience_s=0.5, look_s=0.0)
    owner, unnoted = begin()
    _busy, used = begin(tmp_path)
    ray.kill(owner)
    for _ in range(2):
        assert idle.release() == 0, "nobody waits"
        time.sleep(0.6)
    waiting = placement_group([{"CPU": 1.0}])
    assert not waiting.wait(1)
    assert idle.release() == 1
    assert waiting.wait(30)
    assert [read_state(key) for key in (noted, unnoted, used)] == ["REMOVED", "REMOVED", "CREATED"]
    release_reservations(tmp_path)
    remove_placement_group(waiting)


@pytest.mark.slow
def test_what_a_search_leaves_is_given_back_when_it_ends(ray_cluster: None, tmp_path: Path) -> None:
    others, kept = begin()
    with pytest.raises(KeyboardInterrupt), release_afterwards():
        owner, left = begin()
        ray.kill(owner)
        raise KeyboardInterrupt
    assert kept in list_reservations() and left not in list_reservations()
    ray.get(others.give_back.remote())
    assert kept not in list_reservations()
