"""Rows of the fault table that every run of the tests tries; `make faults` tries them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import drivers, engines, judges, learners, samples  # noqa: F401  (they enter their rows)
from tests.faults.lab import TRIALS, Lab, Outcome, Row, Trial
from tests.faults.report import attempt, format_row, list_numbers, write_page


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Lab:
    return Lab(tmp_path_factory.mktemp("faults"), tiny_model, "transformers")


@pytest.mark.slow
@pytest.mark.parametrize("trial", [t for t in TRIALS if t.quick], ids=lambda trial: trial.name)
def test_nothing_is_lost_by(trial: Trial, lab: Lab) -> None:
    found: list[Outcome] = []
    assert trial.cause(lab, found) == 0, found


def test_rows_have_numbers_of_their_own() -> None:
    numbers = list_numbers()
    assert len(set(numbers)) == len(numbers)
    assert numbers.index("9b") == numbers.index("9") + 1 < numbers.index("10")


def test_the_page_keeps_rows_that_were_not_tried_again(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    first, second, *_ = (row for trial in TRIALS for row in trial.rows)
    write_page(page, {first.number: format_row(first, None, "it | broke")})
    write_page(page, {second.number: format_row(second, Outcome(1.0, 2.25, "", 0), "seen")})
    text = page.read_text()
    assert "1 of 2 rows that were tried held; not tried yet: " in text
    assert f"| {first.number} | {first.title} | " in text and "| it / broke |" in text
    write_page(page, {first.number: format_row(first, Outcome(None, None, ""), "")})
    text = page.read_text()
    assert "2 of 2 rows" in text and "broke" not in text
    assert "| yes | 1.0 | 2.2 | 0 | seen |" in text


def test_a_row_that_does_not_hold_is_told_with_the_reason(lab: Lab) -> None:
    def end_badly(lab: Lab, found: list[Outcome]) -> int:
        found.append(Outcome(1.0, 2.0, "held"))
        raise AssertionError(f"no end in {lab.root}/run\nand more")

    rows = tuple(Row(number, "fault", "end") for number in ("1", "2", "3"))
    lines, held = attempt(Trial(rows, end_badly), lab)
    assert not held and list(lines) == ["2"]
    assert lines["2"].startswith("| 2 | fault | end | **no** |  |  |  | no end in .../run | ")
    lines, held = attempt(
        Trial(rows[:1], lambda lab, found: found.append(Outcome(1, 2, "")) or 3), lab
    )
    assert not held and "3 completions lost" in lines["1"]
