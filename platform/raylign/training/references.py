"""What a reference policy thinks of every answer, computed once and kept.

Its log-probs depend on its weights and the rows alone: not on the loss, the learning rate or the
number of ranks. So they lie in a directory that is named after those two, and a stage that finds
them there computes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from raylign.models.loading import load_model
from raylign.models.precision import narrow
from raylign.training.compared_rows import ComparedFile, ComparisonBatch
from raylign.training.engine import Engine
from raylign.training.objectives import embed_batch
from raylign.training.rows import interleave
from raylign.training.sums import Sums, tally

Assemble = Callable[[Any, slice, int], ComparisonBatch]
Score = Callable[[PreTrainedModel, torch.Tensor, ComparisonBatch], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Reference:
    """Where a reference policy is, and where its log-probs are kept."""

    cache: Path
    """Directory of `SPLIT.npy`, float32 [rows, answers]; named after policy and rows."""
    policy: Path | None = None
    """Directory of its weights; None for the policy in training as it is before the first step."""
    batch: int = 8
    """Rows a rank computes at once."""

    @property
    def identity(self) -> list[Any]:
        """What its log-probs depend on, wherever they lie."""
        return [self.cache.name, self.policy is None]


def write_reference(
    engine: Engine,
    reference: Reference,
    directory: Path,
    split: str,
    assemble: Assemble,
    score: Score,
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Put the log-probs of all answers of a split into the cache, unless they are there.

    The ranks share the rows out. Collective; every rank must see the cache. `beat` is called with
    every micro-batch.
    """
    rows = ComparedFile(directory, split)
    file = reference.cache / f"{split}.npy"
    # One rank may look while another already writes: they decide together.
    seen = torch.tensor([float(not file.exists())], dtype=torch.float64, device=engine.device)
    if not float(engine.sum(seen)):
        return
    values = _score_rows(engine, reference, rows, assemble, score, beat)
    if engine.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{split}.{os.getpid()}.npy")
        np.save(draft, values.cpu().numpy().astype(np.float32))
        os.replace(draft, file)
    engine.sum(torch.zeros(1, dtype=torch.float64, device=engine.device))  # it is there for all


def _score_rows(
    engine: Engine,
    reference: Reference,
    rows: ComparedFile,
    assemble: Assemble,
    score: Score,
    beat: Callable[[], None],
) -> torch.Tensor:
    """float64 [rows, answers], the same on every rank."""
    values = torch.zeros((rows.count, rows.answers), dtype=torch.float64, device=engine.device)
    order = np.argsort(rows.sizes, kind="stable")  # equally long ones together: less padding
    measure = _choose_measure(engine, reference, score)
    for part in interleave(rows.count, engine.data_rank, engine.data_ranks, reference.batch):
        beat()
        chosen = order[part]
        batch = assemble(rows.read(chosen), slice(0, len(chosen)), 0)
        found = measure(batch)
        for place, row in enumerate(chosen.tolist()):
            for answer in range(rows.answers):
                values[row, answer] = found[f"{place}.{answer}"][0]
        engine.sum(torch.zeros(1, device=engine.device))  # nobody runs ahead for long
    return engine.sum(values)


def _choose_measure(
    engine: Engine, reference: Reference, score: Score
) -> Callable[[ComparisonBatch], Sums]:
    """Scores a micro-batch under the engine's own policy, or under another one."""
    function = partial(_list_scores, score)
    if reference.policy is None:
        return lambda batch: engine.measure([batch], function)
    policy = load_model(reference.policy).eval().requires_grad_(False)
    policy.to(engine.device)
    narrow(policy, next(engine.lm.parameters()).dtype)

    @torch.no_grad()
    def measure(batch: ComparisonBatch) -> Sums:
        batch = batch.to(engine.device)
        return function(policy, embed_batch(policy, batch), batch)

    return measure


def _list_scores(
    score: Score, lm: PreTrainedModel, hidden: torch.Tensor, batch: ComparisonBatch
) -> Sums:
    sums = score(lm, hidden, batch)
    return {
        f"{row}.{answer}": tally(value, 1)
        for row, values in enumerate(sums)
        for answer, value in enumerate(values)
    }
