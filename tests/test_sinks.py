"""Sinks get what they are to get, and whatever becomes of them, the run neither fails nor waits."""

from __future__ import annotations

import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from raylign.config import UserError
from raylign.config.alignment import SinksConfig
from raylign.outbox import Outbox
from raylign.sinks import (
    GuardedSink,
    TensorBoardSink,
    build_sinks,
    check_sinks,
    flatten,
    redact,
)


def wait_for(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        time.sleep(0.002)


class Recorder:
    """A sink that keeps what it is told, and does `trouble` at each step."""

    name = "recorder"

    def __init__(self, trouble: Callable[[int], object] = lambda step: None) -> None:
        self.heard: list[object] = []
        self._trouble = trouble

    def open(self) -> None:
        self.heard.append("open")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trouble(step)
        self.heard.append((step, dict(metrics)))

    def rewind(self, step: int) -> None:
        self.heard.append(("rewind", step))

    def close(self) -> None:
        self.heard.append("close")


def test_a_sink_hears_everything_in_order() -> None:
    sink, warned = Recorder(), list[tuple[str, str]]()
    guarded = GuardedSink(sink, lambda name, why: warned.append((name, why)))
    metrics = {"loss": 1.0}
    guarded.log(0, metrics)
    metrics["loss"] = 2.0  # the caller's business, from here on
    guarded.log(1, metrics)
    guarded.rewind(1)
    guarded.log(1, {"loss": 3.0})
    guarded.close()
    assert sink.heard == [
        "open",
        (0, {"loss": 1.0}),
        (1, {"loss": 2.0}),
        ("rewind", 1),
        (1, {"loss": 3.0}),
        "close",
    ]
    assert not warned


def test_what_raises_is_one_warning_and_then_off() -> None:
    def fail(step: int) -> None:
        if step >= 1:
            raise ConnectionError(f"no route to host at step {step}\nand more")

    sink, warned = Recorder(fail), list[tuple[str, str]]()
    guarded = GuardedSink(sink, lambda name, why: warned.append((name, why)))
    for step in range(5):
        guarded.log(step, {})
    wait_for(lambda: not guarded.on)
    guarded.log(9, {})
    guarded.close()
    assert warned == [("recorder", "ConnectionError: no route to host at step 1")]
    assert sink.heard == ["open", (0, {})]


def test_what_hangs_never_holds_the_run_up() -> None:
    released, warned = threading.Event(), list[tuple[str, str]]()
    sink = Recorder(lambda step: released.wait(10))
    guarded = GuardedSink(sink, lambda name, why: warned.append((name, why)), timeout_s=0.1)
    started = time.monotonic()
    guarded.log(0, {})
    wait_for(lambda: guarded._outbox.stuck_seconds > 0.1)
    guarded.log(1, {})
    assert not guarded.on
    guarded.close()
    assert time.monotonic() - started < 5
    assert [name for name, _ in warned] == ["recorder"] and "has not answered" in warned[0][1]
    released.set()

    late, warned = threading.Event(), []
    sink = Recorder(lambda step: late.wait(10))
    guarded = GuardedSink(sink, lambda name, why: warned.append((name, why)), timeout_s=0.1)
    guarded.log(0, {})
    guarded.close()
    assert len(warned) == 1 and "did not finish" in warned[0][1]
    late.set()


def test_a_sink_that_falls_behind_is_turned_off_not_waited_for() -> None:
    released, warned = threading.Event(), list[tuple[str, str]]()
    sink = Recorder(lambda step: released.wait(10))
    guarded = GuardedSink(sink, lambda name, why: warned.append((name, why)), capacity=3)
    for step in range(10):
        guarded.log(step, {})
    assert warned == [("recorder", "is too far behind")]
    released.set()


def test_an_outbox_counts_what_found_no_room() -> None:
    released, done = threading.Event(), list[int]()
    outbox = Outbox("test", 5, lambda error: None)
    outbox.put(lambda: released.wait(10) and None)
    accepted = [outbox.put(lambda i=i: done.append(i), weight=2) for i in range(4)]
    assert accepted == [True, True, False, False] and outbox.lost == 4
    assert outbox.put(lambda: done.append(9), needed=True)
    released.set()
    assert outbox.close(10)
    assert done == [0, 1, 9]
    assert not outbox.put(lambda: done.append(10)) and done == [0, 1, 9]


def test_an_outbox_outlives_work_that_raises() -> None:
    errors, done = list[str](), list[int]()
    outbox = Outbox("test", 5, lambda error: errors.append(str(error)))

    def fail() -> None:
        raise OSError("disk full")

    outbox.put(fail)
    outbox.put(lambda: done.append(1))
    assert outbox.close(10)
    assert errors == ["disk full"] and done == [1]


def read_scalars(directory: Path) -> list[tuple[str, int, float]]:
    """What the event files of a directory hold, oldest file first."""
    from tensorboardX.proto.event_pb2 import Event

    rows = []
    for file in sorted(directory.iterdir(), key=lambda f: f.stat().st_mtime_ns):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4
            if event.HasField("session_log"):
                rows.append(("START", event.step, 0.0))
            rows += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return rows


def test_tensorboard_is_told_what_comes_again(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "tensorboard")
    sink.open()
    sink.log(0, {"reward/total": 0.5, "dropped/no spread": 2.0})
    sink.log(1, {"reward/total": 0.75})
    sink.rewind(1)
    sink.log(1, {"reward/total": 0.25})
    sink.close()
    assert read_scalars(tmp_path / "tensorboard") == [
        ("reward/total", 0, 0.5),
        ("dropped/no_spread", 0, 2.0),
        ("reward/total", 1, 0.75),
        ("START", 1, 0.0),  # hides the line above
        ("reward/total", 1, 0.25),
    ]


def test_a_later_attempt_hides_what_it_does_again(tmp_path: Path) -> None:
    for attempt in (1.0, 2.0):
        sink = TensorBoardSink(tmp_path / "tensorboard")
        sink.log(3, {"x": attempt})
        sink.close()
    rows = read_scalars(tmp_path / "tensorboard")
    assert rows == [("x", 3, 1.0), ("START", 3, 0.0), ("x", 3, 2.0)]


@pytest.mark.parametrize("key", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_said_before_the_run(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, key, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == key else name)
    with pytest.raises(UserError, match=rf"align.sinks.{key}=p.*`pip install '{key}>=[\d.]+'`"):
        build_sinks(SinksConfig(**{key: "p"}), tmp_path, {})
    check_sinks(SinksConfig())


STAND_INS = {
    # Of each client, the calls that are made: enough to see that they are made in this way.
    "wandb": """
calls = []
class Settings(dict):
    def __init__(self, **given): super().__init__(given)
class Run:
    def __getattr__(self, name):
        return lambda *a, **k: calls.append((name, a, k))
def init(**given):
    calls.append(("init", (), given))
    return Run()
""",
    "trackio": """
calls = []
class Run:
    def __getattr__(self, name):
        return lambda *a, **k: calls.append((name, a, k))
def init(**given):
    calls.append(("init", (), given))
    return Run()
""",
}


@pytest.mark.parametrize("key", list(STAND_INS))
def test_clients_are_called_as_they_want(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{key}.py").write_text(STAND_INS[key])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, key, raising=False)
    stage = tmp_path / "runs" / "mine" / ".align.partial"
    config = SinksConfig(tensorboard=False, **{key: "project"})
    for attempt in range(2):
        settings = {"align": {"steps": 3}, "api_key": "k"}
        [sink] = build_sinks(config, stage, settings)
        guarded = GuardedSink(sink, lambda name, why: pytest.fail(f"{name}: {why}"))
        guarded.log(attempt, {"loss": 1.0})
        guarded.close()
    calls = sys.modules.pop(key).calls
    starts = [given for name, _, given in calls if name == "init"]
    assert len(starts) == 2 and starts[0]["project"] == "project"
    assert starts[0]["name"].startswith("mine") and starts[0]["resume"] == "allow"
    assert starts[0]["config"] == {"align": {"steps": 3}, "api_key": "***"}
    # The second attempt goes on with the first one's run.
    assert [starts[0].get("id"), starts[0]["name"]] == [starts[1].get("id"), starts[1]["name"]]
    logged = [(a[0], k) for name, a, k in calls if name == "log"]
    if key == "wandb":
        assert logged == [({"loss": 1.0, "step": 0}, {}), ({"loss": 1.0, "step": 1}, {})]
        assert ("define_metric", ("*",), {"step_metric": "step"}) in calls
    else:
        assert logged == [({"loss": 1.0}, {"step": 0}), ({"loss": 1.0}, {"step": 1})]
    assert calls[-1][0] == "finish"


def test_no_secret_leaves_in_the_settings() -> None:
    settings = {
        "judge": {"api_key": "abc", "endpoint": "https://me:pass@host/v1", "max_tokens": 5},
        "token": "abc",
        "hf_token": "abc",
        "database_password": "abc",
        "note": "use sk-abcdefghijklmnopqrstuv here",
        "password": None,
        "rows": [{"client_secret": 7}, 1.5],
        "path": Path("/models/base"),
    }
    assert redact(settings) == {
        "judge": {"api_key": "***", "endpoint": "https://***@host/v1", "max_tokens": 5},
        "token": "***",
        "hf_token": "***",
        "database_password": "***",
        "note": "use *** here",
        "password": None,
        "rows": [{"client_secret": "***"}, 1.5],
        "path": "/models/base",
    }
    assert list(flatten({"a": {"b": 1, "c": {"d": 2}}, "e": {}})) == [
        ("a.b", 1),
        ("a.c.d", 2),
        ("e", {}),
    ]
