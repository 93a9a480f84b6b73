"""`jobs.scale` says in one line why it cannot do what it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.control import ControlDesk
from jobs.scale import main
from raylign.run import Run


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
