"""How far the rollout workers' log-probs are from the learner's own, at the same version.

Zero but for rounding where both compute the same model. What grows with the age of a sample is
staleness, and is not counted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from raylign.records import Batch, Trajectory
from raylign.tracking import Metric
from raylign.training.policy_scores import PolicyScores


def find_past_gaps(
    batch: Batch, micro_batches: Iterable[Sequence[int]], scores: PolicyScores, version: int
) -> torch.Tensor:
    """[b, T]: learner's minus rollout worker's log-prob of each token that a version before the
    current one has sampled, in the rows of `micro_batches`; NaN elsewhere, and where a version is
    forgotten."""
    gaps = torch.full_like(batch.behaviour_logprobs, torch.nan)
    for rows in micro_batches:
        part, width = batch.select(rows), int(batch.lengths[list(rows)].max())
        index = torch.tensor(list(rows), device=gaps.device)
        sampled = part.versions[part.loss_mask]
        for past in sorted(set(sampled.tolist()) - {version}):
            own = scores.past(part, past)
            if own is not None:
                chosen = part.loss_mask & (part.versions == past)
                gap = own - part.behaviour_logprobs
                gaps[index, :width] = torch.where(chosen, gap, gaps[index, :width])
    return gaps


def find_current_gaps(batch: Batch, version: int) -> torch.Tensor:
    """The same of what the current version has sampled, from `batch.old_logprobs`."""
    if batch.old_logprobs is None:
        return torch.full_like(batch.behaviour_logprobs, torch.nan)
    current = batch.loss_mask & (batch.versions == version)
    return torch.where(current, batch.old_logprobs - batch.behaviour_logprobs, torch.nan)


def measure_gaps(
    gaps: dict[int, np.ndarray], trajectories: Sequence[Trajectory], rows: Sequence[int]
) -> dict[str, Metric]:
    """Mean |gap| of the sampled tokens that could be compared, and the share that could not; `gaps`
    by row of the batch, of which `trajectories` are the `rows`."""
    if not gaps:
        return {}
    tokens = sum(t.sampled_tokens for row, t in zip(rows, trajectories, strict=True) if row in gaps)
    known = np.concatenate([np.abs(gap[~np.isnan(gap)]) for gap in gaps.values()])
    return {
        "mismatch/mean_abs": Metric(float(known.sum(dtype=np.float64)), len(known)),
        "mismatch/unchecked": Metric(tokens - len(known), tokens),
    }
