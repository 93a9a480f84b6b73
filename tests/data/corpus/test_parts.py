"""Parts under real Ray: done once, done again after every kind of end."""

from __future__ import annotations

import io
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from raylign.config import UserError
from raylign.data.corpus.parts import DONE, run_parts, stream_map
from raylign.tokenization.sample import draw_sample
from raylign.tracking import ProgressBoard

BOARD = ProgressBoard(Console(file=io.StringIO()))


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"number": number, "value": number * number} | more for number in range(count)]


def write_value(row: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Notes in `calls` that it was called."""
    with (directory / f"calls-{row['number']}").open("a") as stream:
        stream.write("x")
    name = f"value-{row['number']}"
    (directory / name).write_text(str(row["value"]))
    return {"values": 1, "files": [name]}


def kill_once(row: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The worker of the third part dies by SIGKILL, the first time."""
    mark = directory / "killed"
    if row["number"] == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return write_value(row, directory)


def fill_disk(row: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    (directory / f"big-{row['number']}").write_bytes(b"x" * 100_000)
    return {"files": []}


def mistake(row: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    raise UserError("prepare.sources.0.path=/a: cannot be read; correct it")


def calls(directory: Path) -> dict[str, int]:
    return {file.name: len(file.read_text()) for file in directory.glob("calls-*")}


@pytest.mark.parametrize("stream", [True, False])
def test_every_part_once_in_order_with_its_files(
    ray_cluster: None, tmp_path: Path, stream: bool
) -> None:
    reports = run_parts(
        "square", rows(5), write_value, tmp_path, BOARD, size="values", stream=stream
    )
    assert [int((tmp_path / f"value-{n}").read_text()) for n in range(5)] == [0, 1, 4, 9, 16]
    assert [list(report["files"]) for report in reports] == [[f"value-{n}"] for n in range(5)]
    assert reports[3]["files"]["value-3"]["size"] == 1 and reports[3]["seconds"] >= 0
    again = run_parts("square", rows(5), write_value, tmp_path, BOARD)
    assert again == reports and set(calls(tmp_path).values()) == {1}
    # Another pass over the same rows is another thing to do.
    run_parts("other", rows(5), write_value, tmp_path, BOARD)
    assert set(calls(tmp_path).values()) == {2}


def test_what_changed_or_is_not_finished_is_done(ray_cluster: None, tmp_path: Path) -> None:
    run_parts("square", rows(4), write_value, tmp_path, BOARD)
    done = tmp_path / DONE
    (done / "square-000001.json").unlink()
    (done / "square-000002.json").write_text('{"key": "half')
    changed = rows(4)
    changed[3]["value"] = 100
    run_parts("square", changed, write_value, tmp_path, BOARD)
    assert calls(tmp_path) == {"calls-0": 1, "calls-1": 2, "calls-2": 2, "calls-3": 2}
    assert (tmp_path / "value-3").read_text() == "100"


@pytest.mark.parametrize("stream", [True, False])
def test_a_worker_that_is_killed_is_replaced(
    ray_cluster: None, tmp_path: Path, stream: bool
) -> None:
    reports = run_parts("square", rows(5), kill_once, tmp_path, BOARD, stream=stream)
    assert (tmp_path / "killed").exists()
    assert [list(report["files"]) for report in reports] == [[f"value-{n}"] for n in range(5)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_users_mistake_arrives_as_one(ray_cluster: None, tmp_path: Path, stream: bool) -> None:
    with pytest.raises(UserError, match=r"prepare\.sources\.0\.path=/a: cannot be read"):
        run_parts("square", rows(2), mistake, tmp_path, BOARD, stream=stream)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_named(ray_cluster: None, small_disk: Path) -> None:
    with pytest.raises(UserError, match=f"no space left for {small_disk} .* run again"):
        run_parts("fill", rows(3), fill_disk, small_disk, BOARD)


def test_a_sample_is_the_same_wherever_it_is_drawn(ray_cluster: None, tmp_path: Path) -> None:
    for part in range(4):
        ids = [f"{part}-{row}" for row in range(30)]
        table = pa.table({"doc_id": ids, "text": [f"text of {name}" for name in ids]})
        pq.write_table(table, tmp_path / f"part-{part}.parquet")
    files = sorted(tmp_path.glob("*.parquet"))
    here = draw_sample(files, 25, seed=3)
    assert draw_sample(files, 25, seed=3, spread=stream_map) == here
    assert len(here) == 25 and len({excerpt.text for excerpt in here}) == 25


def test_results_come_in_the_order_of_items(ray_cluster: None) -> None:
    assert stream_map(str, [3, 1, 2]) == ["3", "1", "2"]
    assert stream_map(str, []) == []
