"""Stages are whole or absent, whatever happens while one is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raylign.config import UserError
from raylign.run import (
    INTENT,
    Keeping,
    Run,
    content_hash,
    fingerprint,
    hash_json,
    list_contents,
    verify,
    write_json,
)

# Writes stage `s` once for each call into the file system that writing makes, and dies by SIGKILL
# at that call; says after each death what a reader finds, and whether a rerun completes.
CRASHES = """
import os, shutil, signal, sys
from pathlib import Path
from raylign.run import Run, verify

root, replace = Path(sys.argv[1]), sys.argv[2] == "replace"

def write(run, text, die_at=None):
    calls = 0
    def counted(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call
    if die_at is not None:
        for name in ("open", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
    with run.write("s", {"text": text}, {}) as draft:
        (draft.path / "model").mkdir()
        (draft.path / "model" / "a").write_text(text)
        (draft.path / "b").write_text(text)
    return calls

for die_at in range(1, 1000):
    run = Run(root / str(die_at))
    if replace:
        write(run, "old")
    child = os.fork()
    if not child:
        write(run, "new", die_at)
        os._exit(0)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    stage = run.find("s")
    texts = {(stage.path / name).read_text() for name in ("model/a", "b")} if stage else {"absent"}
    assert not stage or not verify(stage), die_at
    assert died or texts == {"new"}, die_at
    write(run, "newer")
    assert (run.find("s").path / "b").read_text() == "newer"
    assert [p.name for p in run.root.iterdir()] == ["s"], list(run.root.iterdir())
    if not died:
        break
    print(*texts)
"""


def build(run: Run, name: str = "s", text: str = "x", **settings: object) -> None:
    with run.write(name, settings, {}) as draft:
        (draft.path / "file").write_text(text)
        draft.summary["length"] = len(text)


def test_a_finished_stage_says_what_it_is(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.write("s", {"lr": 0.1, "at": Path("a")}, {"corpus": "c0"}) as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "file").write_text("hello")
        draft.summary["loss"] = 1.5
        assert run.find("s") is None
    stage = run.require("s", "job")
    assert stage.path == tmp_path / "s"
    assert stage.manifest.settings == {"lr": 0.1, "at": "a"}
    assert stage.manifest.parents == {"corpus": "c0"}
    assert stage.manifest.summary == {"loss": 1.5}
    assert stage.manifest.files["sub/file"]["size"] == 5
    assert stage.manifest.fingerprint == fingerprint({"lr": 0.1, "at": Path("a")}, {"corpus": "c0"})
    assert verify(stage) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), Run(tmp_path).write("s", {}, {}) as draft:
        (draft.path / "file").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_exception_keeps_the_stage_that_was_there(tmp_path: Path) -> None:
    run = Run(tmp_path)
    build(run, text="old")
    with pytest.raises(ValueError), run.write("s", {}, {}):
        raise ValueError
    assert (run.require("s", "job").path / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("mode", "outcomes"), [("create", {"absent", "new"}), ("replace", {"absent", "old", "new"})]
)
def test_a_kill_at_any_file_operation_leaves_a_whole_stage_or_none(
    tmp_path: Path, mode: str, outcomes: set[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(tmp_path), mode],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": "platform"},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    seen = done.stdout.split()
    assert len(seen) > 10
    assert set(seen) == outcomes


def test_two_processes_cannot_build_one_stage(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.write("s", {}, {}) as draft:
        (draft.path / "file").write_text("mine")
        code = (
            "import sys; from raylign.run import Run\nwith Run(sys.argv[1]).write('s', {}, {}): 0"
        )
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": "platform"},
            cwd=Path(__file__).parents[1],
        )
        assert "UserError: another process is building" in other.stderr
    assert (tmp_path / "s" / "file").read_text() == "mine"


def test_a_directory_that_is_no_stage_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("precious")
    run = Run(tmp_path)
    run.discard("s")
    with pytest.raises(UserError, match="not a finished stage"), run.write("s", {}, {}):
        pass
    assert (tmp_path / "s" / "thesis.txt").read_text() == "precious"


def test_a_run_below_a_file_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"choose another run="):
        build(Run(tmp_path / "file" / "run"))


def test_verify_names_changed_and_missing_files(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.write("s", {}, {}) as draft:
        for name in ("changed", "missing", "well"):
            (draft.path / name).write_text(name)
    stage = run.require("s", "job")
    (stage.path / "changed").write_text("chang€d")
    (stage.path / "missing").unlink()
    assert verify(stage) == ["changed", "missing"]


@pytest.mark.parametrize("text", ["", '{"stage": "s"', "[]", '{"stage": "s"}', "\x00"])
def test_a_damaged_manifest_is_the_users_to_decide(tmp_path: Path, text: str) -> None:
    run = Run(tmp_path)
    build(run)
    (tmp_path / "s" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"is damaged .*; delete .*/s and rerun"):
        run.find("s")
    run.discard("s")
    assert run.find("s") is None


def test_a_missing_stage_names_the_job_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no finished 'sft' stage; run `python -m jobs.sft`"):
        Run(tmp_path).require("sft", "sft")


def test_fingerprints_depend_on_settings_and_parents_alone() -> None:
    one = fingerprint({"a": 1, "b": (1, 2)}, {"x": "h1", "y": "h2"})
    assert one == fingerprint({"b": [1, 2], "a": 1}, {"y": "h2", "x": "h1"})
    assert one != fingerprint({"a": 2, "b": (1, 2)}, {"x": "h1", "y": "h2"})
    assert one != fingerprint({"a": 1, "b": (1, 2)}, {"x": "h1", "y": "h3"})
    # Renaming an input, or moving it, is not other work.
    assert one == fingerprint({"a": 1, "b": (1, 2)}, {"z": "h1", "y": "h2"})


def test_content_is_the_same_wherever_and_whenever_it_was_made(tmp_path: Path) -> None:
    build(Run(tmp_path / "a"), text="same", seed=1)
    build(Run(tmp_path / "b"), text="same", seed=2)
    build(Run(tmp_path / "c"), text="other", seed=1)
    a, b, c = (content_hash(tmp_path / name / "s") for name in "abc")
    assert a == b != c
    # A plain directory with the same file, and a lone file, have a hash too.
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "file").write_text("same")
    assert content_hash(plain) == a
    assert content_hash(plain / "file") != a


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError):
        write_json(file, (loop := {}) | {"loop": [loop.setdefault("me", loop)]})
    assert json.loads(file.read_text()) == {"a": 1}
    assert hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})


def test_a_resumable_stage_keeps_what_it_had(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        run.write("s", {"a": 1}, {}, resume=True) as draft,
    ):
        (draft.path / "first").write_text("1")
        (draft.path / ".work").mkdir()
        (draft.path / ".work" / "state").write_text("x")
        raise RuntimeError("in the middle")
    assert run.find("s") is None
    with run.write("s", {"a": 1}, {}, resume=True) as draft:
        assert (draft.path / "first").read_text() == "1"
        assert (draft.path / ".work" / "state").read_text() == "x"
        (draft.path / "second").write_text("2")
        draft.hashes["second"] = "given"
    stage = run.find("s")
    assert stage is not None
    assert set(stage.manifest.files) == {"first", "second"}
    assert stage.manifest.files["second"]["sha256"] == "given"
    assert {file.name for file in stage.path.iterdir()} == {"first", "second", "manifest.json"}


@pytest.mark.parametrize("second", [{"a": 2}, None])
def test_another_intent_starts_from_nothing(tmp_path: Path, second: dict[str, int] | None) -> None:
    run = Run(tmp_path)
    with pytest.raises(KeyError), run.write("s", {"a": 1}, {}, resume=True) as draft:
        (draft.path / "first").write_text("1")
        raise KeyError
    with run.write("s", second or {"a": 1}, {}, resume=second is not None) as draft:
        assert not (draft.path / "first").exists()
        (draft.path / "other").write_text("2")
    stage = run.find("s")
    assert stage is not None and set(stage.manifest.files) == {"other"}


def begin(run: Run, parents: dict[str, str], **settings: object) -> Path:
    """A stage that was killed after its first checkpoint; `workers` does not count."""
    with (
        pytest.raises(RuntimeError),
        run.write("s", settings, parents, True, keep(settings)) as draft,
    ):
        (draft.path / ".checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
        raise RuntimeError
    return draft.path


def keep(settings: dict[str, object]) -> Keeping:
    counted = {"s": {k: v for k, v in settings.items() if k != "workers"}}
    return Keeping(counted, (".checkpoints/step-*",), "checkpoints", "redo=s or s.resume=never")


def test_what_does_not_count_may_change_before_a_stage_is_finished(tmp_path: Path) -> None:
    run = Run(tmp_path)
    path = begin(run, {"model": "m0"}, lr=0.1, workers=2)
    settings = {"lr": 0.1, "workers": 4}
    with run.write("s", settings, {"model": "m0"}, True, keep(settings)):
        assert (path / ".checkpoints" / "step-1").exists()
    assert run.require("s", "").manifest.settings == settings, "what it was finished with"


@pytest.mark.parametrize(
    ("lr", "model", "said"),
    [(0.2, "m0", "begun with s.lr=0.1, not 0.2, and"), (0.1, "m1", "begun with another model, ")],
)
def test_checkpoints_of_other_settings_are_not_removed_unasked(
    tmp_path: Path, lr: float, model: str, said: str
) -> None:
    begun = begin(Run(tmp_path), {"model": "m0"}, lr=0.1)
    settings = {"lr": lr}
    with (
        pytest.raises(UserError, match=r"\(checkpoints: 1\).*redo=s or s.resume") as caught,
        Run(tmp_path).write("s", settings, {"model": model}, True, keep(settings)),
    ):
        pass
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert (begun / ".checkpoints" / "step-1").exists()
    # The settings are still known: the same ones go on, and others are told apart again.
    assert begin(Run(tmp_path), {"model": "m0"}, lr=0.1) == begun
    # Whoever asks for it begins again: by `redo`, or by not resuming.
    with Run(tmp_path, "s").write("s", settings, {"model": model}, True, keep(settings)):
        assert not (begun / ".checkpoints").exists()
    begun = begin(Run(tmp_path / "never"), {}, lr=0.1)
    with Run(tmp_path / "never").write("s", settings, {}, False, keep(settings)):
        assert not (begun / ".checkpoints").exists()


def test_redo_goes_on_after_its_own_interrupt(tmp_path: Path) -> None:
    begun = begin(Run(tmp_path), {}, lr=0.1)
    with Run(tmp_path, "s").write("s", {"lr": 0.1}, {}, True, keep({"lr": 0.1})):
        assert (begun / ".checkpoints" / "step-1").exists()


def test_an_attempt_without_checkpoints_gives_way(tmp_path: Path) -> None:
    begun = begin(Run(tmp_path), {}, lr=0.1)
    (begun / ".checkpoints" / "step-1").rmdir()
    with Run(tmp_path).write("s", {"lr": 0.2}, {}, True, keep({"lr": 0.2})):
        assert not (begun / ".checkpoints").exists()


@pytest.mark.parametrize("text", ["0123abcd", "{}", "[]", '{"settings": 1}'])
def test_an_unreadable_intent_loses_nothing(tmp_path: Path, text: str) -> None:
    begun = begin(Run(tmp_path), {}, lr=0.1)
    (begun / INTENT).write_text(text)
    assert Run(tmp_path).begun_from("s") == {}
    with (
        pytest.raises(UserError, match="begun with unknown settings"),
        Run(tmp_path).write("s", {"lr": 0.1}, {}, True, keep({"lr": 0.1})),
    ):
        pass
    assert (begun / ".checkpoints" / "step-1").exists()


def test_a_stage_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.write("s", {}, {}) as draft:
        (draft.path / "model" / "deep").mkdir(parents=True)
        for name in ("top", "model/a", "model/deep/b"):
            (draft.path / name).write_text(name)
    stage = run.require("s", "")
    places = (".", "top", "model", "model/a", "model/deep", "model/deep/b")
    assert list_contents(stage) == {content_hash(stage.path / place) for place in places}
