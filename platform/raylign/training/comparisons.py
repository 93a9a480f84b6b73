"""Objectives that learn from judged answers: preference losses, and reward models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from raylign.algorithms.preference import (
    Answers,
    Numbers,
    PreferenceLoss,
    Statistics,
    chosen_cross_entropy,
    compare_labelled,
    compare_rewards,
    find_loss,
    kto,
    kto_kl,
)
from raylign.algorithms.reward import bradley_terry, count_right, right_or_wrong
from raylign.models.crossentropy import score_targets
from raylign.models.heads import score_states
from raylign.training.compared_rows import (
    ComparedFile,
    ComparedRows,
    ComparisonBatch,
    assemble_compared,
    pick_answer,
)
from raylign.training.engine import Engine
from raylign.training.references import Reference, write_reference
from raylign.training.sums import Sums, tally

_PAIRED = ("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy")
_LABELLED = ("rewards/chosen", "rewards/rejected", "rewards/accuracy", "kl")
_RIGHT = ("accuracy", "scores/right", "scores/wrong")


@dataclass(frozen=True, slots=True)
class PreferenceObjective:
    """A policy that prefers what was preferred; a row of `algorithms.preference.LOSSES`."""

    directory: Path
    """Of rows that `write_compared` wrote: chosen and rejected answers; for kto an answer and the
    stranger that `add_strangers` put behind it."""
    loss_name: str
    numbers: Numbers
    pad: int
    sft_weight: float = 0.0
    """Weight of the chosen answers' cross-entropy, beside what the loss has by definition."""
    reference: Reference | None = None
    """Needed by losses that have one."""
    share_prompts: bool = True
    """Compute a prompt once for both of its answers, where that pays."""

    @property
    def measures(self) -> tuple[str, ...]:
        names = _LABELLED if self._row.pair_loss is None else _PAIRED
        return ("loss", *(("cross_entropy",) if self._cross_entropy else ()), *names)

    @property
    def surveyed(self) -> tuple[str, ...]:
        return ("kl",) if self._row.pair_loss is None else ()

    @property
    def _row(self) -> PreferenceLoss:
        return find_loss(self.loss_name)

    @property
    def _cross_entropy(self) -> float:
        return self._row.cross_entropy + self.sft_weight

    def open(self, split: str) -> ComparedFile:
        scores = None if self.reference is None else self.reference.cache / f"{split}.npy"
        return ComparedFile(self.directory, split, scores)

    def begin(self, engine: Engine, scratch: Path, beat: Callable[[], None] = lambda: None) -> None:
        """Score all answers under the reference, unless an earlier stage or start did."""
        if self._row.needs_reference:
            assert self.reference is not None, f"{self.loss_name} needs a reference"
            for split in ("train", "validation"):
                write_reference(
                    engine,
                    self.reference,
                    self.directory,
                    split,
                    self._assemble_all,
                    sum_logprobs,
                    beat,
                )

    def count(self, whole: ComparedRows) -> dict[str, float]:
        chosen = int(whole.lengths[:, 0].sum())
        return {"rows": max(1, len(whole.values)), "chosen_tokens": max(1, chosen)}

    def assemble(self, whole: ComparedRows, part: slice, step: int) -> ComparisonBatch:
        """kto: without the strangers, whose states its loss never reads."""
        if self._row.pair_loss is None:
            return self._assemble_one(whole, part, 0)
        return self._assemble_all(whole, part, step)

    def assemble_survey(self, whole: ComparedRows, part: slice) -> ComparisonBatch:
        """kto: the strangers alone."""
        return self._assemble_one(whole, part, 1)

    def _assemble_all(self, whole: ComparedRows, part: slice, step: int) -> ComparisonBatch:
        return assemble_compared(whole, part, "tokens", pad=self.pad, share=self.share_prompts)

    def _assemble_one(self, whole: ComparedRows, part: slice, answer: int) -> ComparisonBatch:
        rows = pick_answer(whole, part, answer)
        everything = slice(0, len(rows.values))
        return assemble_compared(rows, everything, "tokens", pad=self.pad, share=False)

    def survey(self, lm: PreTrainedModel, hidden: torch.Tensor, batch: ComparisonBatch) -> Sums:
        """kto: the log-ratio of answers to other prompts."""
        ratios = (sum_logprobs(lm, hidden, batch) - batch.reference)[:, 0]
        return {"kl": tally(ratios.sum(), len(ratios))}

    def loss(
        self,
        lm: PreTrainedModel,
        hidden: torch.Tensor,
        batch: ComparisonBatch,
        totals: Mapping[str, float],
    ) -> tuple[torch.Tensor, Sums]:
        if self._row.pair_loss is None:
            return self._judge_labelled(lm, hidden, batch, totals)
        sums, lengths = sum_logprobs(lm, hidden, batch), batch.lengths.clamp(min=1)
        reference = batch.reference if self._row.needs_reference else None
        chosen, rejected = (
            Answers(
                sums[:, side],
                lengths[:, side],
                None if reference is None else reference[:, side],
            )
            for side in (0, 1)
        )
        judged = self._row.pair_loss(chosen, rejected, self.numbers)
        loss = judged.losses.sum() / totals["rows"]
        measured = _tally_all(compare_rewards(judged.chosen_rewards, judged.rejected_rewards))
        if self._cross_entropy:
            entropy = chosen_cross_entropy(chosen)
            loss = loss + self._cross_entropy * entropy / totals["chosen_tokens"]
            measured["cross_entropy"] = tally(entropy, batch.lengths[:, 0].sum())
        return loss, measured | {"loss": tally(loss * totals["rows"], len(sums))}

    def _judge_labelled(
        self,
        lm: PreTrainedModel,
        hidden: torch.Tensor,
        batch: ComparisonBatch,
        totals: Mapping[str, float],
    ) -> tuple[torch.Tensor, Sums]:
        answers = Answers(
            sum_logprobs(lm, hidden, batch)[:, 0],
            batch.lengths[:, 0].clamp(min=1),
            batch.reference[:, 0],
        )
        desirable = batch.values > 0.5
        reference_point = kto_kl(torch.tensor(totals["kl"], device=hidden.device), 1)
        losses, rewards = kto(answers, desirable, reference_point, self.numbers)
        total = losses.sum()
        measured = _tally_all(compare_labelled(rewards, desirable))
        measured["kl"] = tally(reference_point * len(losses), len(losses))
        return total / totals["rows"], measured | {"loss": tally(total, len(losses))}


@dataclass(frozen=True, slots=True)
class RewardObjective:
    """A score for answers, or for their steps."""

    directory: Path
    """Of rows that `write_compared` wrote."""
    kind: Literal["pairs", "outcome", "process"]
    pad: int
    centring: float = 0.0
    """pairs: weight of (chosen + rejected) squared."""
    share_prompts: bool = True
    surveyed: tuple[str, ...] = field(default=(), init=False)

    @property
    def measures(self) -> tuple[str, ...]:
        return ("loss", *(_PAIRED if self.kind == "pairs" else _RIGHT))

    def open(self, split: str) -> ComparedFile:
        return ComparedFile(self.directory, split)

    def begin(self, engine: Engine, scratch: Path, beat: Callable[[], None] = lambda: None) -> None:
        """Nothing to prepare."""

    def count(self, whole: ComparedRows) -> dict[str, float]:
        rows = int((whole.marks > 0).sum()) if self.kind == "process" else len(whole.values)
        return {"rows": max(1, rows)}

    def assemble(self, whole: ComparedRows, part: slice, step: int) -> ComparisonBatch:
        scoring: Literal["marks", "ends"] = "marks" if self.kind == "process" else "ends"
        return assemble_compared(whole, part, scoring, pad=self.pad, share=self.share_prompts)

    def assemble_survey(self, whole: ComparedRows, part: slice) -> ComparisonBatch:
        """Nothing to survey."""
        return self.assemble(whole, part, 0)

    def survey(self, lm: PreTrainedModel, hidden: torch.Tensor, batch: ComparisonBatch) -> Sums:
        """Nothing to survey."""
        return {}

    def loss(
        self,
        lm: PreTrainedModel,
        hidden: torch.Tensor,
        batch: ComparisonBatch,
        totals: Mapping[str, float],
    ) -> tuple[torch.Tensor, Sums]:
        scores = score_states(lm, hidden.flatten(0, 1).index_select(0, batch.places))
        if self.kind == "pairs":
            chosen, rejected = scores.view(-1, 2).unbind(1)
            losses = bradley_terry(chosen, rejected, batch.values, self.centring)
            found = compare_rewards(chosen, rejected)
        else:
            labels = batch.right if self.kind == "process" else batch.values > 0.5
            losses, found = right_or_wrong(scores, labels), count_right(scores, labels)
        total = losses.sum()
        return total / totals["rows"], _tally_all(found) | {"loss": tally(total, len(losses))}


def sum_logprobs(lm: PreTrainedModel, hidden: torch.Tensor, batch: ComparisonBatch) -> torch.Tensor:
    """Sum of log-probs of each answer's marked tokens, float32 [B, A].

    hidden: [S, T, width]. Only states that are read are projected onto the vocabulary.
    """
    places, targets, lengths = batch.places, batch.targets, batch.lengths
    states = hidden.flatten(0, 1).index_select(0, places)

    scores, _ = score_targets(lm, states, targets, entropies=False)
    if not lengths.numel():
        return scores.sum() + torch.zeros(lengths.shape, device=scores.device)
    sums: torch.Tensor = torch.segment_reduce(scores, "sum", lengths=lengths.flatten())
    return sums.view(lengths.shape)


def _tally_all(statistics: Statistics) -> Sums:
    return {name: tally(total, count) for name, (total, count) in statistics.items()}
