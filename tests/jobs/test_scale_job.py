"""A run gets more and fewer workers, by its own measurements and by `jobs.scale`, which says in one
line why it cannot do what it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.control import ControlDesk
from jobs.scale import main
from raylign.run import Run
from tests.faults.align_run import AlignRun
from tests.faults.lab import Lab, end_well


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1
    return found.err


def test_wrong_wishes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no align stage that is going on" in refuse(capsys, str(tmp_path), "--rollouts", "2")
    assert "say what there should be: --rollouts N, --judges N" in refuse(capsys, str(tmp_path))
    assert "--rollouts 0: at least one" in refuse(capsys, str(tmp_path), "--rollouts", "0")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--rollouts", "many"])
    assert stop.value.code == 2


def test_a_finished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Run(tmp_path).write("align", {}, {}) as draft:
        (draft.path / "x").write_text("x")
    assert "is finished; there is nothing to scale" in refuse(
        capsys, str(tmp_path), "--rollouts", "2"
    )


def test_a_run_that_was_killed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ControlDesk(tmp_path / ".align.partial")
    assert "no run is working on" in refuse(capsys, str(tmp_path), "--rollouts", "2")


BALANCE = "{policy: balance, most: 2, every_steps: 1, learner_waits: 0.2, rollouts_wait: 0.5}"


@contextmanager
def hold(file: Path) -> Iterator[None]:
    """No completion is scored meanwhile."""
    file.touch()
    yield
    file.unlink()


def wish(capsys: pytest.CaptureFixture[str], run: AlignRun, *arguments: str) -> str:
    status = main([str(run.root / "run"), *arguments])
    found = capsys.readouterr()
    assert status == 0, found.err
    return found.out


def history(run: AlignRun) -> dict[str, list[str]]:
    """What befell each rollout worker, in its order, without what it did all the time."""
    found: dict[str, list[str]] = {}
    for row in run.events():
        actor = str(row.get("actor"))
        if actor.startswith("rollout-") and row["what"] != "generate":
            seen = found.setdefault(actor, [])
            if row["what"] not in seen:
                seen.append(row["what"])
    return found


@pytest.mark.slow
def test_workers_come_and_go_while_training_runs(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = tmp_path / "hold"
    settings = (
        "steps=24",
        "learner.count=1",
        "rollout.count=1",
        "rollout.max_sequences=2",  # it takes long, and the learner waits
        "rollout.stall_s=60",
        f"scaling={BALANCE}",
        "reward={source: 'tests.jobs.user_rewards:reward_when_let', timeout_s: 200}",
    )
    with Lab(tmp_path, tiny_model, "transformers").run(*settings) as run:
        run.start(RAYLIGN_TEST_HOLD=str(gate))
        # The learner waits for samples: one more. While all wait for rewards: one less.
        run.wait("one more", lambda: run.events(what="scale", count=2, before=1))
        with hold(gate):
            run.wait("it serves", lambda: run.events(what="serves", actor="rollout-1"))
        run.wait("one less", lambda: run.events(what="removed", actor="rollout-1"), 60)
        assert run.events(what="scale", count=1, before=2)

        # The user overrules that.
        with hold(gate):
            said = wish(capsys, run, "--rollouts", "3", "--rewards", "2")
        assert "rollouts: 1 -> 3 workers; align.scaling.policy=balance no longer" in said
        assert "rewards: 2 workers, 1 before" in said
        serving = run.metrics()[-1]["step"]
        run.wait_for_step(serving + 2)
        assert run.metrics()[-1]["workers/rollout"] == 3
        assert wish(capsys, run, "--rollouts", "1").startswith("rollouts: 3 -> 1 workers\n")
        with hold(gate):
            refused = refuse(capsys, str(run.root / "run"), "--judges", "2")
            assert refused == "error: this run has no judges; it has rollouts, rewards\n"
            refused = refuse(capsys, str(run.root / "run"), "--rewards", "99")
            assert "97 more would need 9.7 CPU" in refused
        end_well(run, 0.0)

        assert run.lost() == 0 and run.summary()["trained"] == 24 * 24
        born = {"rollout-2": 1, "rollout-3": 1}
        for worker, seen in history(run).items():
            # Nobody serves before it has proved the weights of the moment.
            assert seen[:3] == ["started", "sync", "serves"], (worker, seen)
            assert seen[3:] == ([] if worker == "rollout-0" else ["removed"])
            assert born.pop(worker, 1)
        assert not born and not run.events(what="lost")
        first = [row["version"] for row in run.events(what="sync", actor="rollout-2")]
        assert first[0] >= serving - 1
        assert "is finished; there is nothing" in refuse(
            capsys, str(run.root / "run"), "--rollouts", "2"
        )
