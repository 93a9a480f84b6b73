"""What a step shows: numbers of its samples, beside those of the learner."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from actors.buffer import Group, count_staleness
from actors.learner import LearnerReport
from raylign.records import Trajectory
from raylign.rewards.outcomes import Rejection
from raylign.training.batches import LearnerBatch


def measure_step(
    groups: Sequence[Group],
    learned: Sequence[Trajectory],
    report: LearnerReport,
    version: int,
) -> dict[str, float]:
    """Metrics of a step that was learned at policy `version`."""
    staleness, oldest = count_staleness(learned, version)
    rewards = [t.reward or 0.0 for t in learned]
    mean = _mean(rewards)
    metrics = {name: metric.mean for name, metric in report.metrics.items()}
    metrics |= {
        "reward/total": mean,
        "reward/std": _mean([(reward - mean) ** 2 for reward in rewards]) ** 0.5,
        "length": _mean([t.sampled_tokens for t in learned]),
        "length/max": max((t.sampled_tokens for t in learned), default=0),
        "turns": _mean([t.turns for t in learned]),
        "truncated": _mean([t.finish_reason == "length" for t in learned]),
        "staleness/mean": staleness,
        "staleness/max": oldest,
        "groups/no_spread": _mean([not group.spread for group in groups]),
        "learn_seconds": report.end - report.start,
        "samples": len(learned),
        "sampled_tokens": sum(t.sampled_tokens for t in learned),
    }
    if "mismatch/mean_abs" in report.metrics:
        metrics["mismatch/max_abs"] = report.mismatch_max
    for part in sorted({name for t in learned for name in t.reward_parts}):
        values = [t.reward_parts.get(part, 0.0) for t in learned]
        metrics[f"reward/{part}"] = _mean(values)
        agreement = _correlate(rewards, values)
        if agreement is not None and values != rewards:
            metrics[f"agreement/{part}"] = agreement
    return metrics


def regroup(batch: LearnerBatch) -> list[Group]:
    """The groups that a batch on disk was made of, as far as it knows them."""
    kept: dict[str, list[Trajectory]] = {}
    for trajectory in batch.trajectories:
        kept.setdefault(trajectory.group_id, []).append(trajectory)
    rejected: dict[str, list[Rejection]] = {}
    for request, reason, count in batch.record["drops"]:
        one = Rejection("", request, reason)
        rejected.setdefault(request, []).extend([one] * count)
    return [
        Group(tuple(kept.get(request, ())), tuple(rejected.get(request, ())), request)
        for request in dict.fromkeys((*kept, *rejected))
    ]


def describe_sample(trajectory: Trajectory) -> dict[str, Any]:
    """What there is to read of a completion; JSON."""
    return {
        "prompt_id": trajectory.prompt_id,
        "completion": trajectory.text,
        "finish_reason": trajectory.finish_reason,
        "reward": _finite(trajectory.reward),
        "parts": {name: _finite(value) for name, value in trajectory.reward_parts.items()},
        "versions": list(trajectory.version_span),
        "worker": trajectory.worker,
        "turns": trajectory.turns,
        "sampled_tokens": trajectory.sampled_tokens,
    }


def describe_left_out(left_out: Iterable[tuple[str, Rejection]]) -> list[dict[str, Any]]:
    """What there is to read of completions, each with its request, that are not learned from."""
    rows = []
    for request, rejection in left_out:
        found: dict[str, Any] = {"prompt_id": rejection.prompt_id, "completion": None}
        if rejection.trajectory is not None:
            found = describe_sample(rejection.trajectory)
        rows.append({"request": request, **found, "left_out": rejection.reason})
        if rejection.detail:
            rows[-1]["detail"] = rejection.detail
    return rows


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _correlate(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation, -1 to 1; None where one of them is the same throughout."""
    means = _mean(first), _mean(second)
    offsets = [(a - means[0], b - means[1]) for a, b in zip(first, second, strict=True)]
    scale = (sum(a * a for a, _ in offsets) * sum(b * b for _, b in offsets)) ** 0.5
    return sum(a * b for a, b in offsets) / scale if scale > 1e-9 * len(offsets) else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
