"""A pass over many parts on Ray, each part whole or absent, and never done twice.

A part is a row of plain values with a `number`. Its worker writes the part's files and then, last
and by rename, `.done/PASS-NUMBER.json`: what was made, with size and hash. A pass that was killed
at any moment, driver or worker, therefore continues after the parts that have such a file. What a
part makes may depend on its row and on files of earlier stages alone, so a part done again has the
same bytes, wherever and whenever that is.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from raylign.config import UserError
from raylign.run import hash_file, hash_json, write_json
from raylign.runtime import is_full
from raylign.tracking import ProgressBoard

DONE = ".done"

Work = Callable[[dict[str, Any], Path], Mapping[str, Any]]
"""(row, directory) to what is worth knowing; `files` among it names the files that were written,
relative to the directory."""


def run_parts(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    work: Work,
    directory: Path,
    board: ProgressBoard,
    unit: str = "part",
    size: str | None = None,
    stream: bool = True,
) -> list[dict[str, Any]]:
    """Do `work` for every row that is not done yet; what every part reported, in order of number.

    `work` must be picklable (a function of a module, or a `partial` of one), and each row JSON with
    an integer `number`. Reports also hold `seconds`, `cpu_seconds` and, for every file, `size` and
    `sha256`. The bar counts parts, and beside them the sum of a report's `size`. Raises the first
    `UserError` of a worker.

    With `stream` the rows are a Ray Data dataset: for passes that read, extract and measure.
    Without, they are plain tasks: for passes that compare, join or tokenise, where the streaming
    executor would cost a good part of the work.
    """
    (directory / DONE).mkdir(parents=True, exist_ok=True)
    reports: dict[int, dict[str, Any]] = {}
    pending: list[Mapping[str, Any]] = []
    for row in rows:
        report = _read_report(_report_file(directory, name, row["number"]), hash_json(row))
        if report is None:
            pending.append(row)
        else:
            reports[row["number"]] = report
    total = sum(int(report[size]) for report in reports.values()) if size else 0
    with board.bar(name, len(rows), unit) as bar:
        bar.update(len(reports), note=f"{total:,} {size}" if size else "")
        for number in (_stream if stream else _spread)(name, pending, work, directory):
            report = json.loads(_report_file(directory, name, number).read_text(encoding="utf-8"))
            reports[number] = report
            total += int(report[size]) if size else 0
            bar.update(len(reports), note=f"{total:,} {size}" if size else "")
    return [reports[row["number"]] for row in rows]


def _stream(
    name: str, rows: Sequence[Mapping[str, Any]], work: Work, directory: Path
) -> Iterator[int]:
    """Numbers of the parts, as they are done, by Ray Data."""
    if not rows:
        return
    _quiet()
    items = [{"number": row["number"], "row": json.dumps(row)} for row in rows]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        partial(_do, name=name, work=work, directory=str(directory)),
        batch_size=1,
        batch_format="pyarrow",
    )
    for row in dataset.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield row["number"]


def stream_map(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Results of a picklable `function` for each of `items`, in their order, by Ray Data."""
    if not items:
        return []
    _quiet()
    rows = [{"number": n, "item": pickle.dumps(item)} for n, item in enumerate(items)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        partial(_apply, function=function), batch_size=1, batch_format="pyarrow"
    )
    results = {row["number"]: pickle.loads(row["result"]) for row in dataset.iter_rows()}
    return [results[number] for number in range(len(items))]


def _apply(rows: pa.Table, function: Callable[[Any], Any]) -> pa.Table:
    """Runs in a worker."""
    results = [pickle.dumps(function(pickle.loads(item))) for item in rows["item"].to_pylist()]
    return pa.table({"number": rows["number"], "result": pa.array(results, pa.binary())})


def _spread(
    name: str, rows: Sequence[Mapping[str, Any]], work: Work, directory: Path
) -> Iterator[int]:
    """Numbers of the parts, as they are done, by plain tasks; a few more than there are CPUs."""
    do = ray.remote(_do).options(scheduling_strategy="SPREAD")
    shared = ray.put(work)
    waiting = list(reversed(rows))
    running: set[ray.ObjectRef] = set()
    while waiting or running:
        window = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting and len(running) < window:
            row = waiting.pop()
            table = pa.table({"number": [row["number"]], "row": [json.dumps(row)]})
            running.add(do.remote(table, name, shared, str(directory)))
        ready, rest = ray.wait(list(running), num_returns=1)
        running = set(rest)
        for row in ray.get(ready[0]).to_pylist():
            if row["error"]:
                raise UserError(row["error"])
            yield row["number"]


def _do(rows: pa.Table, name: str, work: Work, directory: str) -> pa.Table:
    """Runs in a worker. A user's mistake travels as text: Ray would wrap it in a traceback."""
    errors: list[str | None] = []
    for row in map(json.loads, rows["row"].to_pylist()):
        try:
            _do_part(row, name, work, Path(directory))
            errors.append(None)
        except UserError as error:
            errors.append(str(error))
        except OSError as error:
            if not is_full(error):
                raise
            errors.append(
                f"no space left for {directory} ({error.strerror or error}); free some and run "
                "again: finished parts are kept"
            )
    return pa.table({"number": rows["number"], "error": pa.array(errors, pa.string())})


def _do_part(row: dict[str, Any], name: str, work: Work, directory: Path) -> None:
    started, used = time.monotonic(), time.process_time()
    report = dict(work(row, directory))
    files = {
        file: {"size": (directory / file).stat().st_size, "sha256": hash_file(directory / file)}
        for file in report.get("files", ())
    }
    report |= {
        "key": hash_json(row),
        "files": files,
        "seconds": round(time.monotonic() - started, 3),
        "cpu_seconds": round(time.process_time() - used, 3),
    }
    write_json(_report_file(directory, name, row["number"]), report)


def _report_file(directory: Path, name: str, number: int) -> Path:
    return directory / DONE / f"{name}-{number:06d}.json"


def _read_report(file: Path, key: str) -> dict[str, Any] | None:
    """The report of a finished part, unless it was made from another row."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return report if report.get("key") == key else None


def _quiet() -> None:
    """Ray Data's own bars and plans stay in its log file; the board shows progress."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.get_name() == "console":
            handler.setLevel(logging.ERROR)
