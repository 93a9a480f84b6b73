"""What is told of a group of ranks that failed; the runs themselves are in tests/jobs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError

from raylign.config import UserError, WorkersConfig
from raylign.tracking import JsonTracker
from raylign.training.curve import draw_curve
from raylign.training.supervised import _raise_failure, _tell_failure, explain_failure

ECHO = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1")


def test_the_first_failure_of_a_group_is_told_not_its_echo() -> None:
    defect = explain_failure("sft", 2, {0: ECHO, 1: ZeroDivisionError("at\nheart"), 2: ECHO})
    assert isinstance(defect, RuntimeError)
    assert str(defect) == "sft: rank 1 failed: ZeroDivisionError: heart"


def test_a_dead_process_is_for_the_user_to_put_right() -> None:
    death = explain_failure("sft", 2, {0: ECHO, 1: ActorDiedError()})
    assert isinstance(death, UserError)
    assert str(death).startswith("sft: rank 1 died, after 2 restarts of the group (")
    assert "lower sft.micro_batch_size" in str(death) and "\n" not in str(death)


def test_an_echo_alone_is_told_as_it_is() -> None:
    assert "Connection closed by peer" in str(explain_failure("sft", 0, {0: ECHO, 1: ECHO}))


def record(directory: Path, *events: dict[str, Any]) -> Any:
    tracker = JsonTracker(directory)
    for event in events:
        tracker.event(**event)
    tracker.close()
    return SimpleNamespace(name="sft", output=directory)


def test_a_rank_that_keeps_hanging_is_named_when_the_budget_is_spent(tmp_path: Path) -> None:
    hung = {"what": "hung", "rank": 1, "text": "rank 1 (h, process 7) has not moved for 46 s"}
    error = WorkerGroupError("workers died", {0: ECHO, 1: ActorDiedError()})
    task = record(tmp_path, {"what": "started", "step": 0}, hung)
    with pytest.raises(UserError) as caught:
        _raise_failure(task, WorkersConfig(max_failures=2), error)
    assert str(caught.value).startswith(
        "sft: rank 1 (h, process 7) has not moved for 46 s; given up after 2 restarts"
    )
    assert "raise sft.engine.timeout_s" in str(caught.value) and "\n" not in str(caught.value)
    task = record(tmp_path, {"what": "started", "step": 10})
    with pytest.raises(UserError, match="rank 1 died"):  # this time it was something else
        _raise_failure(task, WorkersConfig(max_failures=2), error)


def test_a_save_that_failed_is_shown_until_one_succeeds(tmp_path: Path) -> None:
    failed = {"what": "checkpoint_failed", "step": 20, "reason": "No space left", "kept": None}
    saved = {"what": "checkpoint", "step": 10}
    assert _tell_failure([saved]) == _tell_failure([]) == _tell_failure([failed, saved]) == ""
    assert _tell_failure([saved, failed]) == "  checkpoint 20 not written: No space left"
    kept = failed | {"kept": "step-00000010"}
    assert _tell_failure([saved, kept]).endswith("No space left; step-00000010 is kept")


def test_the_curve_shows_both_losses_and_is_the_same_every_time(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 4 / step} for step in range(1, 9)]
    rows[3]["validation_loss"] = 1.2345
    for name in ("a.svg", "b.svg"):
        draw_curve(rows, "pretrain", tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    for word in (">training<", ">validation<", ">pretrain<", ">step<", ">1.234<"):
        assert word in text or word.replace("1.234", "1.235") in text, word
    draw_curve([], "pretrain", tmp_path / "none.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg"]
