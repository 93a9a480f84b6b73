"""What may be learned from: the one place that drops samples, with a reason for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raylign.records import Trajectory


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The scored completions of one prompt, and the reasons of those that were rejected."""

    trajectories: tuple[Trajectory, ...]
    rejected: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Admitted:
    """What one step learns from."""

    trajectories: tuple[Trajectory, ...]
    groups: tuple[int, ...]
    """Group number of each trajectory."""
    dropped: dict[str, int]
    """Samples left out, by reason. dispatched = admitted + dropped, always."""


def admit(
    groups: Iterable[Group], *, needs_groups: bool, version: int, max_staleness: int
) -> Admitted:
    """Samples fit for learning at policy `version`.

    Left out, and counted: samples the reward rejected, samples without a single sampled token,
    samples older than `max_staleness` (which dispatch makes impossible; it is checked all the
    same), and a sample left alone in a group that the algorithm compares within.
    """
    trajectories: list[Trajectory] = []
    numbers: list[int] = []
    dropped: Counter[str] = Counter()
    for number, group in enumerate(groups):
        dropped.update(group.rejected)
        kept = []
        for trajectory in group.trajectories:
            reason = _reject(trajectory, version, max_staleness)
            if reason:
                dropped[reason] += 1
            else:
                kept.append(trajectory)
        if needs_groups and len(kept) == 1:
            dropped["alone in its group"] += 1
            continue
        trajectories += kept
        numbers += [number] * len(kept)
    return Admitted(tuple(trajectories), tuple(numbers), dict(dropped))


def _reject(trajectory: Trajectory, version: int, max_staleness: int) -> str | None:
    if not trajectory.sampled_tokens:
        return "empty"
    if version - trajectory.version_span[0] > max_staleness:
        return "stale"
    return None


def count_staleness(trajectories: Sequence[Trajectory], version: int) -> tuple[float, int]:
    """Mean over sampled tokens, and largest, number of versions behind `version`."""
    total = tokens = largest = 0
    for trajectory in trajectories:
        lags = version - trajectory.versions[trajectory.loss_mask]
        total, tokens = total + int(lags.sum()), tokens + len(lags)
        largest = max(largest, int(lags.max(initial=0)))
    return (total / tokens if tokens else 0.0), largest
