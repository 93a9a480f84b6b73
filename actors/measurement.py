"""What a step shows: numbers of its samples, beside those of the learner."""

from __future__ import annotations

from collections.abc import Sequence

from actors.buffer import Group, count_staleness
from actors.learner import LearnerReport
from raylign.records import Trajectory
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
        metrics[f"reward/{part}"] = _mean([t.reward_parts.get(part, 0.0) for t in learned])
    return metrics


def regroup(batch: LearnerBatch) -> list[Group]:
    """The groups that a batch on disk was made of, as far as it knows them."""
    kept: dict[str, list[Trajectory]] = {}
    for trajectory in batch.trajectories:
        kept.setdefault(trajectory.group_id, []).append(trajectory)
    rejected: dict[str, list[str]] = {}
    for request, reason, count in batch.record["drops"]:
        rejected.setdefault(request, []).extend([reason] * count)
    return [
        Group(tuple(kept.get(request, ())), tuple(rejected.get(request, ())), request)
        for request in dict.fromkeys((*kept, *rejected))
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
