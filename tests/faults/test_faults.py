"""Rows of the fault table that every run of the tests tries; `make faults` tries them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import drivers, engines, judges, learners, samples  # noqa: F401  (they enter their rows)
from tests.faults.lab import FAULTS, Fault, Lab


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
