"""Rows of the fault table that every run of the tests tries; `make faults` tries them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import drivers, engines, judges, learners, samples  # noqa: F401  (they enter their rows)
from tests.faults.lab import FAULTS, Fault, Lab, Outcome
from tests.faults.report import format_row, write_page


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Lab:
    return Lab(tmp_path_factory.mktemp("faults"), tiny_model, "transformers")


@pytest.mark.slow
@pytest.mark.parametrize("row", [r for r in FAULTS if r.quick], ids=lambda r: r.cause.__name__)
def test_nothing_is_lost_by(row: Fault, lab: Lab) -> None:
    outcome = row.cause(lab)
    assert outcome.lost == 0, outcome


def test_rows_have_numbers_of_their_own() -> None:
    numbers = [row.number for row in FAULTS]
    assert len(set(numbers)) == len(numbers)


def test_the_page_keeps_rows_that_were_not_tried_again(tmp_path: Path) -> None:
    page, (first, second, *_) = tmp_path / "docs" / "page.md", FAULTS
    write_page(page, {first.number: format_row(first, None, "it | broke")})
    write_page(page, {second.number: format_row(second, Outcome(1.0, 2.25, 0, "seen"), "seen")})
    text = page.read_text()
    assert "1 of 2 rows that were tried held; not tried yet: " in text
    assert f"| {first.number} | {first.title} | " in text and "| it / broke |" in text
    write_page(page, {first.number: format_row(first, Outcome(None, None, 0, ""), "")})
    text = page.read_text()
    assert (
        "2 of 2 rows" in text and "broke" not in text and "| yes | 1.0 | 2.2 | 0 | seen |" in text
    )
