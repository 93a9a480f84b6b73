"""Broadcasts among real processes: whoever dies or stops is named, the others get the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from broadcast_group import COUNT, DEADLINE_S

pytestmark = pytest.mark.slow
Said = dict[str, tuple[int, Any, float]]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the learner and its readers saw."""
    script = Path(__file__).parent / "broadcast_group.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def check_received(said: Said, names: str, version: int) -> None:
    assert set(said) == set(names)
    for seen_version, seen, seconds in said.values():
        assert seen_version == version and seconds < DEADLINE_S
        assert seen == 2.0**20 * sum(version + index for index in range(COUNT))


def test_members_that_stay_stay_in_one_group(found: dict[str, Any]) -> None:
    check_received(found["first"], "abc", 0)
    assert found["groups"] == 1  # two versions, one rendezvous


def test_a_stopped_member_is_named_within_the_deadline_and_left_out(found: dict[str, Any]) -> None:
    check_received(found["stopped"], "ac", 2)
    assert found["lost"][0] == ["b", 2, "made no progress for 1 s"]
    version, message, _ = found["resumed"]["b"]
    assert version == 2 and "given up on this worker" in message
    check_received(found["again"], "abc", 3)  # it may come back


def test_a_killed_member_is_named_and_the_others_go_on(found: dict[str, Any]) -> None:
    check_received(found["killed"], "ab", 4)
    assert found["lost"][1:] == [["c", 4, "its connection closed"]]


def test_a_newcomer_takes_the_current_version_or_the_one_before(found: dict[str, Any]) -> None:
    check_received(found["older"], "d", 3)
    check_received(found["newcomer"], "d", 5)
    assert found["gone version"]["a"][1].endswith("version 5: the learner holds it no longer")


def test_a_learner_that_is_gone_is_said_at_once(found: dict[str, Any]) -> None:
    for _, message, seconds in found["gone learner"].values():
        assert "the learner" in message and " is gone" in message and seconds < DEADLINE_S
