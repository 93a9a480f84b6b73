"""What is minimised: functions of the decoder's hidden states, as sums over explicit denominators.

An objective says which rows it learns from, what their denominators are, and what the loss of a
micro-batch is *given the hidden states* of its tokens. It never calls the model itself, so any
engine can run it: whole, partitioned, or with the decoder's layers on several ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from raylign.models.crossentropy import sum_costs
from raylign.models.enclosure import embed_context, run_inside
from raylign.runtime import derive_seed
from raylign.training.engine import Engine
from raylign.training.noise import gather_noise, noisy
from raylign.training.rows import (
    CorpusRows,
    DemonstrationRows,
    MicroBatch,
    Rows,
    TextRows,
    assemble,
)
from raylign.training.sums import Sums, tally


class Objective(Protocol):
    """What a stage minimises. Small and picklable: every rank gets a copy.

    `whole` is what `open(split).read(rows)` gives: all rows of a step, over all ranks.
    """

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the sums that `loss` returns; `loss` is among them."""
        ...

    @property
    def surveyed(self) -> tuple[str, ...]:
        """Names of the sums that `survey` returns; empty when a step needs no survey."""
        ...

    def open(self, split: str) -> Rows[Any]:
        """The rows of `train` or `validation`."""
        ...

    def begin(self, engine: Engine, scratch: Path, beat: Callable[[], None] = lambda: None) -> None:
        """Called once before the first step, by all ranks together; `scratch` outlives a restart
        and not the stage. `beat` is called again and again, as a sign of life."""
        ...

    def count(self, whole: Any) -> dict[str, float]:
        """The denominators of a step, each at least 1."""
        ...

    def assemble(self, whole: Any, part: slice, step: int) -> Any:
        """A micro-batch (`Inputs`) of some rows; of none, one whose loss is zero."""
        ...

    def assemble_survey(self, whole: Any, part: slice) -> Any:
        """The micro-batch of the same rows that `survey` gets."""
        ...

    def survey(self, lm: PreTrainedModel, hidden: torch.Tensor, batch: Any) -> Sums:
        """What a step must know of all its rows before any loss is computed; no gradient. The
        means, over all ranks, are added to the step's totals by name."""
        ...

    def loss(
        self, lm: PreTrainedModel, hidden: torch.Tensor, batch: Any, totals: Mapping[str, float]
    ) -> tuple[torch.Tensor, Sums]:
        """This micro-batch's share of the step's loss, a float32 scalar, and what it measured.

        hidden: [B, T, width], after the decoder's last norm. Shares add up over micro-batches and
        ranks: divide by `totals`, never by what this batch holds.
        """
        ...


@dataclass(frozen=True, slots=True)
class LanguageObjective:
    """Next-token prediction: mean cross-entropy over the trained tokens, in nats."""

    directory: Path
    """Of packed shards, or of rows that `write_demonstrations` wrote."""
    kind: str
    """`corpus` or `demonstrations`."""
    isolate: bool = True
    """No attention across the documents of a row."""
    length: int | None = None
    """corpus: tokens in a row, when shorter than the shards'."""
    noise: float = 0.0
    """NEFTune's alpha: noise on the embeddings in training."""
    noise_seed: int = 0
    measures: tuple[str, ...] = ("loss",)
    surveyed: tuple[str, ...] = ()

    def open(self, split: str) -> Rows[TextRows]:
        if self.kind == "corpus":
            return CorpusRows(self.directory, split, self.isolate, self.length)
        return DemonstrationRows(self.directory, split)

    def begin(self, engine: Engine, scratch: Path, beat: Callable[[], None] = lambda: None) -> None:
        """Nothing to prepare."""

    def count(self, whole: TextRows) -> dict[str, float]:
        return {"tokens": max(1, int(whole.trained.sum()))}

    def assemble(self, whole: TextRows, part: slice, step: int) -> MicroBatch:
        batch = assemble(whole, part, self.isolate)
        if not self.noise or part.start == part.stop:
            return batch
        keys = [derive_seed(self.noise_seed, step, row) for row in range(part.start, part.stop)]
        segments = whole.segments[part, : batch.tokens.shape[1]]
        return replace(batch, noise=gather_noise(self.noise, keys, segments))

    def assemble_survey(self, whole: TextRows, part: slice) -> MicroBatch:
        """Nothing to survey."""
        return self.assemble(whole, part, 0)

    def survey(self, lm: PreTrainedModel, hidden: torch.Tensor, batch: MicroBatch) -> Sums:
        """Nothing to survey."""
        return {}

    def loss(
        self,
        lm: PreTrainedModel,
        hidden: torch.Tensor,
        batch: MicroBatch,
        totals: Mapping[str, float],
    ) -> tuple[torch.Tensor, Sums]:
        total = sum_cross_entropy(lm, hidden, batch.tokens, batch.trained)
        return total / totals["tokens"], {"loss": tally(total, batch.trained.sum())}


def sum_cross_entropy(
    lm: PreTrainedModel,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    trained: torch.Tensor,
    *,
    piece: int | None = None,
) -> torch.Tensor:
    """Sum over the trained tokens of -log p(token | tokens before it), in nats; a float32 scalar.

    hidden: [B, T, width]; tokens: int64 [B, T]; trained: bool [B, T], True where token t is a
    target (column 0 must be False: nothing predicts it). Only trained positions are projected onto
    the vocabulary, `piece` of them at a time (by memory when None).
    """
    chosen = trained[:, 1:]
    states, targets = hidden[:, :-1][chosen], tokens[:, 1:][chosen]
    return sum_costs(lm, states, targets, piece=piece)


def score_text(
    module: nn.Module,
    tokens: torch.Tensor,
    trained: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    piece: int | None = None,
) -> torch.Tensor:
    """`sum_cross_entropy` of a whole model, or of what wraps one. Shapes as in `MicroBatch`."""
    batch = MicroBatch(tokens, trained, attention_mask, position_ids)
    return run_inside(module, partial(_score_text, piece=piece), batch)


def _score_text(lm: PreTrainedModel, batch: MicroBatch, piece: int | None) -> torch.Tensor:
    hidden = embed_batch(lm, batch)
    return sum_cross_entropy(lm, hidden, batch.tokens, batch.trained, piece=piece)


def embed_batch(lm: PreTrainedModel, batch: Any) -> torch.Tensor:
    """Hidden states [B, T, width] of a micro-batch (`Inputs`)."""
    given = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    with noisy(lm, batch.noise if isinstance(batch, MicroBatch) else None):
        return embed_context(lm, batch.tokens, **{k: v for k, v in given.items() if v is not None})
