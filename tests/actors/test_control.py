"""A wish reaches the run that goes on, and nobody waits for one that does not."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.control import Answer, ControlDesk, Wish, ask, is_running
from raylign.config import UserError


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Path]:
    """A directory that a run holds."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield tmp_path
    os.close(descriptor)


def serve(desk: ControlDesk, count: int, answers: list[Wish]) -> None:
    while len(answers) < count:
        for wish in desk.take():
            answers.append(wish)
            desk.answer(wish, Answer(True, f"now {wish.workers['rollouts']}"))


def test_each_wish_gets_its_own_answer(stage: Path) -> None:
    desk, seen = ControlDesk(stage), list[Wish]()
    thread = threading.Thread(target=serve, args=(desk, 3, seen))
    thread.start()
    for count in (1, 2, 3):
        assert ask(stage, Wish({"rollouts": count}), 10.0) == Answer(True, f"now {count}")
    thread.join()
    assert [wish.workers["rollouts"] for wish in seen] == [1, 2, 3]
    assert desk.take() == []


def test_a_run_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run is working on"):
        ask(tmp_path / "none", Wish({"rollouts": 1}), 10.0)
    ControlDesk(tmp_path)  # left behind by a run that was killed: nobody holds the directory
    assert not is_running(tmp_path)
    with pytest.raises(UserError, match="no run is working on"):
        ask(tmp_path, Wish({"rollouts": 1}), 10.0)


def test_silence_ends_at_the_deadline_and_the_wish_is_withdrawn(stage: Path) -> None:
    desk = ControlDesk(stage)
    with pytest.raises(UserError, match="has not answered within 0 s"):
        ask(stage, Wish({"rollouts": 1}), 0.3)
    assert desk.take() == []


def test_a_wish_waits_for_the_attempt_that_listens(stage: Path) -> None:
    """A run that is starting, and one that starts again after it was killed."""
    for _ in range(2):
        seen = list[Wish]()

        def listen(seen: list[Wish] = seen) -> None:
            time.sleep(0.5)
            serve(ControlDesk(stage), 1, seen)

        thread = threading.Thread(target=listen)
        thread.start()
        assert ask(stage, Wish({"rollouts": 4}), 10.0) == Answer(True, "now 4")
        thread.join()
        assert len(seen) == 1


def test_old_wishes_are_not_granted_to_a_new_attempt(stage: Path) -> None:
    ControlDesk(stage)
    with pytest.raises(UserError):
        ask(stage, Wish({"rollouts": 9}), 0.0)
    (stage / ".control" / "wish-x.json").write_text('{"workers": {"rollouts": 9}, "id": "x"}')
    assert ControlDesk(stage).take() == []
