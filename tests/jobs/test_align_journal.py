"""What a run leaves to be read: every completion, nothing twice, and never at the run's expense."""

from __future__ import annotations

import io
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.buffer import Group, admit
from actors.learner import LearnerReport
from actors.measurement import describe_left_out
from jobs.align_journal import AlignJournal
from jobs.align_panel import draw_panel, tabulate_steps
from jobs.align_rows import list_rollouts, spell_tokens
from raylign.records import Prompt, Trajectory
from raylign.rewards.outcomes import Rejection, reject
from raylign.tracking import ProgressBoard, read_lines
from raylign.training.batches import LearnerBatch, read_batch, write_batch

PROMPTS = {f"p{i}": Prompt(f"p{i}", (1, 2), f"what is {i}?", str(i)) for i in range(3)}


def make_trajectory(prompt: str, group: str, token: int, reward: float | None) -> Trajectory:
    return Trajectory(
        prompt_id=prompt,
        group_id=group,
        token_ids=np.array([1, 2, token, 7, 8], np.int32),
        loss_mask=np.array([0, 0, 1, 0, 1], bool),
        logprobs=np.array([0, 0, -0.5, 0, -0.25], np.float32),
        versions=np.array([-1, -1, 3, -1, 4], np.int32),
        finish_reason="stop",
        text=f"<{token}>",
        reward=reward,
        reward_parts={"correct": float(reward or 0)},
        worker="rollout-0",
    )


def make_step(step: int) -> tuple[list[Group], LearnerBatch, LearnerReport]:
    """Two groups of two and one that lost a completion; the second has no spread."""
    groups = [
        Group(
            tuple(make_trajectory("p0", f"{step}/0", t, r) for t, r in ((4, 1.0), (5, 0.0))),
            request=f"{step}/0",
        ),
        Group(
            tuple(make_trajectory("p1", f"{step}/1", 4, 1.0) for _ in range(2)),
            request=f"{step}/1",
        ),
        Group(
            (make_trajectory("p2", f"{step}/2", 6, 0.5),),
            rejected=(
                reject(
                    make_trajectory("p2", f"{step}/2", 9, None), "reward raised ValueError", "9?"
                ),
                Rejection("p2", f"{step}/2", "prompt lost", "two workers died of it"),
            ),
            request=f"{step}/2",
        ),
    ]
    admitted = admit(groups, needs_groups=True, needs_spread=True, version=4, max_staleness=1)
    record = {"left_out": describe_left_out(admitted.left_out)}
    scaled = tuple(replace(t, reward=2 * (t.reward or 0)) for t in admitted.trajectories)
    batch = LearnerBatch(step, scaled, admitted.groups, {}, record)
    gap = np.array([math.nan, math.nan, 1e-6, math.nan, -3e-6], np.float32)
    report = LearnerReport(
        metrics={},
        mismatch_max=3e-6,
        advantages=(1.0, -1.0),
        gaps={1: gap},
        start=0.0,
        end=1.0,
        token_advantages={1: np.array([0, 0, 0.25, 0, -1.0], np.float32)},
    )
    return groups, batch, report


def spell(ids: object) -> list[str]:
    return [f"t{i}" for i in ids]  # type: ignore[attr-defined]


@contextmanager
def open_bar(terminal: bool = False) -> Iterator[tuple[object, io.StringIO]]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    with ProgressBoard(console, plain_every=0.0) as board, board.bar("align", 4) as bar:
        yield bar, out


def test_every_completion_has_a_row_and_its_fate() -> None:
    groups, batch, report = make_step(2)
    rows = list_rollouts(2, 4, groups, batch, report, PROMPTS, spell)
    shown = [(r["request"], r["completion"], r["left_out"], r.get("advantage")) for r in rows]
    assert shown == [
        ("2/0", "<4>", None, 1.0),
        ("2/0", "<5>", None, -1.0),
        ("2/1", "<4>", "no spread", None),
        ("2/1", "<4>", "no spread", None),
        ("2/2", "<9>", "reward raised ValueError", None),
        ("2/2", None, "prompt lost", None),
        ("2/2", "<6>", "alone in its group", None),
    ]
    first = rows[0]
    assert first["prompt"] == "what is 0?" and first["reference"] == "0"
    assert (first["reward"], first["parts"], first["versions"]) == (2.0, {"correct": 1.0}, [3, 4])
    assert (first["worker"], first["turns"], first["sampled_tokens"]) == ("rollout-0", 1, 2)
    assert all({"worker", "versions", "prompt"} <= row.keys() for row in rows if row["completion"])
    assert rows[4]["detail"] == "9?" and rows[4]["versions"] == [3, 4]
    assert rows[5]["prompt"] == "what is 2?" and rows[5]["detail"] == "two workers died of it"
    assert first["mismatch"] is None and rows[1]["mismatch"] == pytest.approx(2e-6)
    assert rows[1]["tokens"] == {
        "ids": [5, 7, 8],
        "texts": ["t5", "t7", "t8"],
        "sampled": [1, 0, 1],
        "logprobs": [-0.5, None, -0.25],
        "gaps": [1e-6, None, -3e-6],
        "advantages": [0.25, None, -1.0],
    }
    assert "advantages" not in rows[0]["tokens"]  # its tokens have all the same
    assert "gaps" not in rows[0]["tokens"]  # not in the mismatch sample
    json.dumps(rows, allow_nan=False)


def test_rows_are_the_same_for_a_batch_from_the_disk(tmp_path: Path) -> None:
    groups, batch, report = make_step(2)
    write_batch(tmp_path / "b", batch)
    again = read_batch(tmp_path / "b")
    assert again is not None
    rows = list_rollouts(2, 4, groups, batch, report, PROMPTS)
    assert list_rollouts(2, 4, groups, again, report, PROMPTS) == rows
    # And without the groups, which a restarted run does not have, it still says all.
    alone = list_rollouts(2, 4, [], again, report, PROMPTS)
    assert sorted(map(str, alone)) == sorted(map(str, rows))


def test_what_was_made_and_never_learned_from_says_why(tmp_path: Path) -> None:
    with open_bar() as (bar, _):
        journal = AlignJournal(tmp_path, bar, PROMPTS)
        run_steps(journal, range(3))
        journal.unlearned(3, 4, make_step(3)[0], "rolled back")
        journal.rewind(1, "rolled back")
        run_steps(journal, range(1, 3))
        journal.rewind(2)  # a restart: it will all come again, but for what was undone
        run_steps(journal, range(2, 3))
        journal.close()
    rows = read_lines(tmp_path / "rollouts.jsonl")
    undone = [row for row in rows if row.get("undone")]
    assert Counter(row["step"] for row in rows if not row.get("undone")) == {0: 7, 1: 7, 2: 7}
    assert Counter(row["step"] for row in undone) == {1: 7, 2: 7, 3: 7}
    assert {row["left_out"] for row in undone} == {"rolled back"}
    details = {row.get("detail") for row in undone if row["step"] == 2}
    assert {None, "no spread", "reward raised ValueError; 9?"} <= details
    assert {row["completion"] for row in undone if row["step"] == 3} == {
        "<4>",
        "<5>",
        "<6>",
        "<9>",
        None,
    }


def test_what_is_not_a_number_is_left_empty() -> None:
    groups, batch, report = make_step(0)
    report = replace(report, advantages=(math.nan, 1.0), gaps={0: np.full(5, np.nan, np.float32)})
    rows = list_rollouts(0, 4, groups, batch, report, {})
    assert rows[0]["advantage"] is None and rows[0]["mismatch"] is None
    assert rows[0]["prompt"] is None and rows[0]["prompt_id"] == "p0"


def run_steps(journal: AlignJournal, steps: range) -> None:
    for step in steps:
        journal.event(actor="learner", what="learn", start=1.0, end=2.0, step=step)
        journal.rollouts(step, 4, *make_step(step))
        journal.step(
            step,
            {
                "reward/total": 0.25 * step,
                "length": 2.0,
                "samples": 2,
                "sampled_tokens": 4,
                "step_seconds": 2.0,
                "mismatch/mean_abs": 1e-6,
                "dropped/no spread": 2.0,
            },
        )


def test_files_hold_what_was_said_and_nothing_of_what_was_undone(tmp_path: Path) -> None:
    with open_bar() as (bar, _):
        journal = AlignJournal(tmp_path, bar, PROMPTS, every=2, spell=spell)
        run_steps(journal, range(3))
        journal.rewind(1)
        run_steps(journal, range(1, 4))
        journal.close()
    metrics, rollouts = (read_lines(tmp_path / f"{n}.jsonl") for n in ("metrics", "rollouts"))
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert metrics[0]["tokens_per_second"] == 2.0
    assert [row["step"] for row in rollouts] == [step for step in range(4) for _ in range(7)]
    assert {row["step"] for row in rollouts if "tokens" in row} == {0, 2, 3}  # 3: the last
    examples = read_lines(tmp_path / "examples.jsonl")
    assert [row["step"] for row in examples] == [0, 0, 2, 2, 3, 3]
    assert examples[0]["completions"][0] == {
        "text": "<4>", "reward": 1.0, "parts": {"correct": 1.0}, "version": 3,
    }  # fmt: skip
    assert len(read_lines(tmp_path / "events.jsonl")) == 6  # what happened, has happened
    assert journal.summary == {
        "steps": 4,
        "reward_first": 0.0,
        "reward_last": 0.75,
        "mismatch_worst": 1e-6,
        "samples": 8,
        "sampled_tokens": 16,
        "dropped/no spread": 8.0,
    }


def test_a_second_attempt_goes_on_with_the_first_ones_books(tmp_path: Path) -> None:
    with open_bar() as (bar, _):
        whole = AlignJournal(tmp_path / "whole", bar, PROMPTS)
        run_steps(whole, range(4))
        whole.close()
        first = AlignJournal(tmp_path / "two", bar, PROMPTS)
        run_steps(first, range(3))
        first.close()
        with (tmp_path / "two" / "rollouts.jsonl").open("a") as torn:
            torn.write('{"step": 1, "cut sho')
        second = AlignJournal(tmp_path / "two", bar, PROMPTS)
        second.rewind(2)
        run_steps(second, range(2, 4))
        second.close()
    assert second.summary == whole.summary
    for name in ("rollouts.jsonl", "examples.jsonl"):
        assert read_lines(tmp_path / "two" / name) == read_lines(tmp_path / "whole" / name)


def test_a_disk_that_fails_is_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "rollouts.jsonl").mkdir()  # cannot be written
    with open_bar() as (bar, _):
        journal = AlignJournal(tmp_path, bar, PROMPTS)
        run_steps(journal, range(2))
        journal.close()
    assert journal.summary["journal_lost"] == 2
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [0, 1]


def test_what_finds_no_room_is_counted_and_nobody_waits(tmp_path: Path) -> None:
    released = threading.Event()
    with open_bar() as (bar, _):
        journal = AlignJournal(tmp_path, bar, PROMPTS, capacity=4)
        journal._outbox.put(lambda: released.wait(10) and None)
        started = time.monotonic()
        run_steps(journal, range(20))
        journal.rewind(5)
        assert time.monotonic() - started < 5
        released.set()
        journal.close()
    assert journal.summary["journal_lost"] > 50 and journal.summary["steps"] == 5


def test_speed_counts_what_is_done_between_steps(tmp_path: Path) -> None:
    with open_bar() as (bar, _):
        journal = AlignJournal(tmp_path, bar, PROMPTS)
        measured = {"sampled_tokens": 100, "step_seconds": 0.1}
        journal.step(0, measured)
        time.sleep(0.5)  # a checkpoint, say
        journal.step(1, measured)
        time.sleep(0.5)
        journal.rewind(2)
        journal.step(2, measured)  # after a rollback, whose time is nobody's step
        journal.step(3, {"sampled_tokens": 100})  # of an earlier attempt: nobody knows
        journal.close()
    rows = read_lines(tmp_path / "metrics.jsonl")
    first, second, third, fourth = [row.get("tokens_per_second") for row in rows]
    assert first == third == pytest.approx(1000) and 0 < second <= 200 and fourth is None


class FailingSink:
    name = "failing"

    def open(self) -> None:
        raise ConnectionError("no network")

    log = rewind = close = None  # type: ignore[assignment]


def test_a_sink_that_fails_is_one_event(tmp_path: Path) -> None:
    with open_bar() as (bar, _):
        journal = AlignJournal(tmp_path, bar, PROMPTS, [FailingSink()])  # type: ignore[list-item]
        run_steps(journal, range(3))
        journal.close()
    said = [row for row in read_lines(tmp_path / "events.jsonl") if row["what"] == "sink_off"]
    assert [(row["sink"], row["reason"]) for row in said] == [
        ("failing", "ConnectionError: no network")
    ]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 3


def test_a_terminal_has_a_panel_and_a_log_has_lines(tmp_path: Path) -> None:
    with open_bar(terminal=True) as (bar, out):
        journal = AlignJournal(tmp_path / "a", bar, PROMPTS)
        run_steps(journal, range(2))
        journal.event(actor="rollout-1", what="lost", reason="killed [red]by 9")
        journal.close()
    shown = out.getvalue()
    assert "reward" in shown and "2 tokens/s" in shown
    assert "rollout-1 lost killed [red]by 9" in shown  # text, not markup
    with open_bar() as (bar, out):
        journal = AlignJournal(tmp_path / "b", bar, PROMPTS)
        run_steps(journal, range(2))
        journal.close()
    lines = out.getvalue().splitlines()
    assert lines[1].startswith("align: 2/4 steps, ")
    assert lines[1].endswith("reward 0.25  length 2  kl 0.000  mismatch 1.0e-06")
    assert lines[2].split() == ["step", "reward", "length", "mismatch", "tok/s"]
    assert lines[4].split() == ["1", "0.250", "2", "1e-06", "2"]


def draw(drawn: object) -> str:
    console = Console(file=io.StringIO(), width=110, color_system=None)
    console.print(drawn)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_panel_says_what_was_measured_and_no_more() -> None:
    shown = draw(
        draw_panel(
            {
                "reward/total": 0.875,
                "reward/correct": 0.75,
                "turns": 1.0,
                "workers/rollouts": 3,
                "restarts/rollouts": 1,
                "ledger/dispatched": 1234,
                "ledger/trained": 1200,
                "ledger/dropped": 4,
                "ledger/in_flight": 30,
            }
        )
    )
    assert "0.875  correct 0.750" in shown and "turns" not in shown
    assert "rollouts 3  restarts of rollouts 1" in shown
    assert "1,234 dispatched = 1,200 trained + 4 dropped + 30 in flight" in shown
    assert "policy" not in shown and "nan" not in shown
    assert draw(draw_panel({})).strip() == ""


def test_the_table_has_the_last_steps() -> None:
    rows = [{"step": step, "reward/total": step / 100} for step in range(25)]
    lines = draw(tabulate_steps(rows)).splitlines()
    assert lines[0].strip() == "last 10 of 25 steps" and len(lines) == 12
    assert lines[-1].split() == ["24", "0.240"]


def test_token_texts_join_to_the_text() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    built = Tokenizer(model)
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built)
    for text in ("two words", "\N{EURO SIGN}5 é", "\N{GRINNING FACE}" * 3 + " end", ""):
        ids = tokenizer.encode(text)
        texts = spell_tokens(tokenizer, ids)
        assert "".join(texts) == text and len(texts) == len(ids)
    assert spell_tokens(tokenizer, tokenizer.encode("é!")) == ["", "é", "!"]
    half = tokenizer.encode("é")[:1]
    assert spell_tokens(tokenizer, half) == ["\N{REPLACEMENT CHARACTER}"]


class StuckBar:
    """A bar on a terminal that takes nothing."""

    total = 4

    def __init__(self) -> None:
        self.released = threading.Event()

    def pin(self, drawn: object) -> None:
        self.released.wait(10)
        raise OSError("the terminal is gone")

    show = update = pin


def test_a_terminal_that_is_stuck_or_gone_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.align_journal.SCREEN_S", 0.05)
    bar, started = StuckBar(), time.monotonic()
    journal = AlignJournal(tmp_path, bar, PROMPTS)  # type: ignore[arg-type]
    run_steps(journal, range(3))
    journal.close()
    assert time.monotonic() - started < 5
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 3 and journal.summary["steps"] == 3
    bar.released.set()
