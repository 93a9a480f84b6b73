"""How well a model does on the rows that were held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel

from raylign.training.engine import Engine
from raylign.training.objectives import Objective
from raylign.training.rows import Rows, deal
from raylign.training.sums import Sums, add

Measurement = Callable[[PreTrainedModel, torch.Tensor, Any], Sums]
"""(model, hidden states, micro-batch) to what is measured."""
COUNTED = 1024
"""Rows whose denominators are counted at once."""


class Validation:
    """The validation split of an objective, as the ranks of an engine share it out."""

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        micro_batch: int,
        stages: int,
        beat: Callable[[], None],
    ) -> None:
        """stages: of a pipeline, or 1. `beat` is called with every micro-batch."""
        self._engine, self._objective, self._beat = engine, objective, beat
        self._rows: Rows[Any] = objective.open("validation")
        self._micro_batch = micro_batch
        # As many at once as keep a pipeline full; else one, so that no rank runs ahead for long.
        self._at_once = 4 * stages if stages > 1 else 1
        self._totals: dict[str, float] = {}

    @property
    def count(self) -> int:
        """Rows there are."""
        return self._rows.count

    def measure(self) -> dict[str, float]:
        """Means over the whole split, by name; collective."""
        objective = self._objective
        surveys: dict[str, float] = {}
        if objective.surveyed:
            surveys = average(self._engine, self._sum(objective.survey, surveying=True))
        totals = self._count() | surveys

        def lose(lm: PreTrainedModel, hidden: torch.Tensor, batch: Any) -> Sums:
            return objective.loss(lm, hidden, batch, totals)[1]

        return average(self._engine, self._sum(lose))

    def _sum(self, measurement: Measurement, surveying: bool = False) -> Sums:
        """This rank's sums over its micro-batches."""
        found: Sums = {}
        batches = self._read(surveying)
        while group := list(islice(batches, self._at_once)):
            add(found, self._measure_group(group, measurement))
            self._engine.sum(torch.zeros(1, device=self._engine.device))
        return found

    def _measure_group(self, group: list[Any], measurement: Measurement) -> Sums:
        def function(lm: PreTrainedModel, hidden: torch.Tensor, batch: Any) -> Sums:
            self._beat()
            return measurement(lm, hidden, batch)

        return self._engine.measure(group, function)

    def _count(self) -> dict[str, float]:
        """The denominators of the whole split, counted once: what a loss that adds up several means
        weighs them by, however the split is cut."""
        if not self._totals:
            for start in range(0, self.count, COUNTED):
                self._beat()
                whole = self._rows.read(range(start, min(start + COUNTED, self.count)))
                for name, value in self._objective.count(whole).items():
                    self._totals[name] = self._totals.get(name, 0.0) + value
        return self._totals

    def _read(self, surveying: bool) -> Iterator[Any]:
        """This rank's micro-batches, of a survey or of the loss, one at a time."""
        engine, objective, rows = self._engine, self._objective, self._rows
        for part in deal(rows.count, engine.data_rank, engine.data_ranks, self._micro_batch):
            self._beat()
            whole = rows.read(range(rows.count)[part])
            everything = slice(0, part.stop - part.start)
            if surveying:
                yield objective.assemble_survey(whole, everything)
            else:
                yield objective.assemble(whole, everything, 0)


def average(engine: Engine, sums: Sums) -> dict[str, float]:
    """Total / count over all ranks, by name; NaN where nothing was counted. Collective."""
    if not sums:
        return {}
    table = engine.sum(torch.stack([sums[name] for name in sorted(sums)])).tolist()
    return {
        name: total / count if count else float("nan")
        for name, (total, count) in zip(sorted(sums), table, strict=True)
    }
