"""Exact reductions, files that survive a kill, and a board for terminals and logs alike."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
from pathlib import Path

from rich.console import Console

from raylign.tracking import (
    EVENTS_FILE,
    METRICS_FILE,
    GrowingLines,
    JsonTracker,
    Metric,
    ProgressBoard,
    append_rows,
    cut_lines,
    merge,
    read_lines,
)


def test_any_grouping_of_metrics_has_the_same_mean() -> None:
    rng = random.Random(0)
    # Binary fractions: their sums are exact, so equality may be too.
    parts = [{"loss": Metric(rng.randrange(100) / 8, rng.randrange(1, 9))} for _ in range(12)]
    total = sum(p["loss"].total for p in parts)
    count = sum(p["loss"].count for p in parts)
    for cut in range(1, 12):
        halves = [merge(parts[:cut]), merge(parts[cut:])]
        assert merge(reversed(halves))["loss"] == Metric(total, count)
    assert merge(parts)["loss"].mean == total / count


def test_the_mean_weighs_by_count_not_by_worker() -> None:
    merged = merge([{"r": Metric(1.0, 1)}, {"r": Metric(0.0, 3)}, {"kl": Metric(0.5)}])
    assert merged["r"].mean == 0.25
    assert merged["kl"] == Metric(0.5, 1.0)
    assert math.isnan(Metric(0.0, 0.0).mean)
    assert merge([]) == {}


def test_what_is_tracked_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    tracker = JsonTracker(tmp_path / "deep" / "er")
    tracker.log(1, {"loss": 2.5})
    tracker.event(actor="rollout-0", what="generate", start=1.0, end=2.0)
    rows = read_lines(tmp_path / "deep" / "er" / METRICS_FILE)
    events = read_lines(tmp_path / "deep" / "er" / EVENTS_FILE)
    tracker.close()
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 2.5)]
    assert (events[0]["actor"], events[0]["end"]) == ("rollout-0", 2.0)


def test_a_growing_file_gives_what_reading_it_whole_gives(tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    lines = GrowingLines(file)
    assert lines.read() == []
    text = "".join(json.dumps({"step": step, "why": "ä\u2028"}) + "\n" for step in range(4))
    written = text.encode()
    for end in range(len(written) + 1):
        file.write_bytes(written[:end])
        ended = written[: written.rfind(b"\n", 0, end) + 1]
        assert lines.read() == [json.loads(line) for line in ended.split(b"\n") if line]
    draft = tmp_path / "rewound"  # as the loop does when it goes back to a checkpoint
    draft.write_text("".join(f'{{"step": {step}}}\n' for step in range(100)))
    draft.replace(file)
    assert [row["step"] for row in lines.read()] == list(range(100))
    file.write_text('{"step": 7}\n')
    assert lines.read() == [{"step": 7}]
    file.unlink()
    assert lines.read() == []


def test_a_line_cut_short_at_any_byte_costs_itself_only(tmp_path: Path) -> None:
    tracker = JsonTracker(tmp_path)
    for step in (1, 2):
        tracker.log(step, {"loss": 0.5})
    tracker.close()
    whole = (tmp_path / METRICS_FILE).read_bytes()
    second = whole.index(b"\n") + 1
    for length in range(second, len(whole)):
        (tmp_path / METRICS_FILE).write_bytes(whole[:length])
        complete = [1, 2] if length == len(whole) - 1 else [1]
        assert [row["step"] for row in read_lines(tmp_path / METRICS_FILE)] == complete
        resumed = JsonTracker(tmp_path)
        resumed.log(3, {"loss": 0.5})
        resumed.close()
        assert [row["step"] for row in read_lines(tmp_path / METRICS_FILE)] == [*complete, 3]


def test_lines_may_hold_any_character_and_be_missing(tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\x85d", "é\n", ""]
    file = tmp_path / "x.jsonl"
    file.write_text(
        "".join(json.dumps({"t": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8"
    )
    assert [row["t"] for row in read_lines(file)] == texts
    file.write_bytes(file.read_bytes() + '{"t": "é'.encode()[:-1])
    assert len(read_lines(file)) == 4
    assert read_lines(tmp_path / "none.jsonl") == []


def test_lines_are_cut_at_a_step(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    cut_lines(file, 0)
    file.write_text(
        '{"step": 1, "a": 2}\n{"a": 1, "step": 2}\nnonsense\n{"step": 10}\n'
        '{"step": 2, "b": "\\u2028"}\n{"step": 1, "torn": '
    )
    cut_lines(file, 3)
    assert read_lines(file) == [
        {"step": 1, "a": 2},
        {"a": 1, "step": 2},
        {"step": 2, "b": "\u2028"},
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.jsonl"]
    cut_lines(file, 0)
    assert file.read_bytes() == b""


def test_rows_are_added_after_a_line_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    append_rows(file, [{"step": 0, "path": tmp_path}])
    with file.open("a") as torn:
        torn.write('{"step": 1, "cut')
    append_rows(file, [{"step": 2}, {"step": 3}])
    assert read_lines(file) == [{"step": 0, "path": str(tmp_path)}, {"step": 2}, {"step": 3}]


def render(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=60, color_system=None)
    with ProgressBoard(console, plain_every=0.0) as board:
        board.say("stage " + "x" * 80)
        with board.bar("pretrain", 4, "step") as bar:
            for step in itertools.count(1):
                bar.update(step, f"loss {1 / step:.2f}")
                if step == 4:
                    break
        with board.bar("sft", None, "row") as bar:
            bar.update(2, total=8)
    return out.getvalue()


def test_a_log_gets_plain_lines_with_rate_and_note() -> None:
    lines = render(terminal=False).splitlines()
    assert lines[0] == "stage " + "x" * 80  # not wrapped: logs are searched by line
    steps = [line for line in lines if line.startswith("pretrain: ")]
    assert len(steps) == 5  # one for each update, one at the end
    assert steps[1].startswith("pretrain: 2/4 steps, 0 s, 0 s left, ")
    assert steps[-1].startswith("pretrain: 4/4 steps, ") and steps[-1].endswith("/s  loss 0.25")
    assert lines[-1].startswith("sft: 2/8 rows, ")


def test_a_terminal_gets_bars() -> None:
    shown = render(terminal=True)
    assert "━" in shown and "4/4" in shown and "pretrain: " not in shown


def test_what_is_pinned_is_seen_on_a_terminal_only() -> None:
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=60, color_system=None)
        with ProgressBoard(console, plain_every=1e9) as board, board.bar("align", 4) as bar:
            bar.pin("reward 0.75")
            bar.pin(None)
            bar.show("the end")
        assert ("reward 0.75" in out.getvalue()) == terminal
        assert out.getvalue().count("the end") == 1
