"""Nothing is lost and nothing is counted twice, whatever happens in which order."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from actors.ledger import LEDGER_FILE, NOTHING_SETTLED, Ledger, LedgerError, Totals


def test_the_books_balance_after_every_single_event() -> None:
    rng = random.Random(1)
    ledger = Ledger()
    open_: dict[str, int] = {}
    trained, dropped = 0, Counter[str]()
    for turn in range(500):
        if not open_ or rng.random() < 0.4:
            open_[f"r{turn}"] = rng.randint(1, 8)
            ledger.dispatch(f"r{turn}", 0, "p", open_[f"r{turn}"])
        else:
            request = rng.choice(sorted(open_))
            count = rng.randint(1, open_[request])
            open_[request] -= count
            if not open_[request]:
                del open_[request]
            if rng.random() < 0.7:
                ledger.train(request, 0, count)
                trained += count
            else:
                reason = rng.choice(["empty", "stale"])
                ledger.drop(request, 0, reason, count)
                dropped[reason] += count
        totals = ledger.totals
        assert totals.in_flight == sum(open_.values())
        assert totals.trained == trained and totals.dropped == dropped
        assert totals.dispatched == totals.in_flight + trained + sum(dropped.values())


def test_what_is_undone_is_accounted_for() -> None:
    ledger = Ledger()
    for number in range(4):
        ledger.dispatch(f"{number}/0", number, "p", 4)
    ledger.train("0/0", 0, 3)
    ledger.drop("0/0", 0, "empty", 1)
    settled = ledger.settled()
    ledger.train("1/0", 1, 4)
    ledger.drop("2/0", 1, "stale", 2)
    assert ledger.undo(settled, "rolled back", 2) == 12
    assert ledger.totals == Totals(16, 3, {"empty": 1, "rolled back": 12}, 0)
    ledger.dispatch("1/0", 1, "p", 4)
    assert ledger.undo(settled, "rolled back", 2) == 16
    assert ledger.totals == Totals(20, 3, {"empty": 1, "rolled back": 16}, 0)
    fresh = Ledger()
    fresh.dispatch("0/0", 0, "p", 4)
    assert fresh.undo(NOTHING_SETTLED, "rolled back", 1) == 4


def test_nothing_is_booked_twice() -> None:
    ledger = Ledger()
    ledger.dispatch("0/1", 0, "p", 4)
    with pytest.raises(LedgerError, match="already in flight"):
        ledger.dispatch("0/1", 0, "p", 4)
    ledger.train("0/1", 0, 3)
    with pytest.raises(LedgerError, match="has 1 completions in flight, not 2"):
        ledger.drop("0/1", 0, "empty", 2)
    ledger.drop("0/1", 0, "empty", 1)
    with pytest.raises(LedgerError, match="has 0 completions"):
        ledger.train("0/1", 0, 1)
    ledger.dispatch("0/1", 0, "p", 4)  # asked for again, after all of it was settled


def test_books_that_do_not_balance_are_refused() -> None:
    with pytest.raises(LedgerError, match="5 completions were dispatched and 4"):
        Totals(5, 2, {"empty": 1}, 1).check()


def test_what_is_in_flight_is_asked_for_again_after_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / LEDGER_FILE
    first = Ledger(file)
    first.dispatch("0/0", 0, "a", 2)
    first.dispatch("0/1", 0, "b", 2)
    first.train("0/0", 0, 1)
    first.drop("0/0", 0, "empty", 1)
    settled = json.loads(json.dumps(first.settled()))
    first.close()
    again = Ledger(file)
    again.restore(settled)
    assert again.totals == Totals(2, 1, {"empty": 1}, 0)
    again.dispatch("0/1", 0, "b", 2)
    again.train("0/1", 0, 2)
    assert again.totals == Totals(4, 3, {"empty": 1}, 0)
    again.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["what"] for line in lines] == [
        *("dispatched", "dispatched", "trained", "dropped"),
        *("dispatched", "trained"),
    ]
    assert lines[3]["reason"] == "empty" and lines[4]["prompt"] == "b"
    with pytest.raises(LedgerError, match="in use"):
        again.restore(settled)
