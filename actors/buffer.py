"""What may be learned from: the one place that drops samples, with a reason for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raylign.records import Trajectory
from raylign.rewards.outcomes import Rejection, reject


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The scored completions of one prompt, and those that were rejected."""

    trajectories: tuple[Trajectory, ...]
    rejected: tuple[Rejection, ...] = ()
    request: str = ""
    """What the completions were asked for under."""

    @property
    def spread(self) -> bool:
        """Whether two of the rewards differ: only then does a comparison teach anything."""
        return len({t.reward for t in self.trajectories}) > 1


@dataclass(frozen=True, slots=True)
class Drop:
    """Completions of one request that are not learned from."""

    request: str
    reason: str
    completions: int


@dataclass(frozen=True, slots=True, eq=False)
class Admitted:
    """What one step learns from."""

    trajectories: tuple[Trajectory, ...]
    groups: tuple[int, ...]
    """Group number of each trajectory."""
    trained: dict[str, int]
    """Completions that are learned from, by request."""
    drops: tuple[Drop, ...]
    """The others: dispatched = admitted + dropped, always."""
    left_out: tuple[tuple[str, Rejection], ...]
    """The same one by one, each with its request."""

    @property
    def dropped(self) -> dict[str, int]:
        """Samples left out, by reason."""
        return count_drops(self.drops)


def count_drops(drops: Iterable[Drop]) -> dict[str, int]:
    """Completions by reason."""
    counts: Counter[str] = Counter()
    for drop in drops:
        counts[drop.reason] += drop.completions
    return dict(counts)


def admit(
    groups: Iterable[Group],
    *,
    needs_groups: bool,
    version: int,
    max_staleness: int,
    needs_spread: bool = False,
) -> Admitted:
    """Samples fit for learning at policy `version`.

    Left out, and counted: samples the reward rejected, samples without a single sampled token,
    samples older than `max_staleness` (which dispatch makes impossible; it is checked all the
    same), a sample left alone in a group that the algorithm compares within, and with
    `needs_spread` groups whose rewards are all the same (dynamic sampling; DAPO).
    """
    trajectories: list[Trajectory] = []
    numbers: list[int] = []
    trained: dict[str, int] = {}
    drops: list[Drop] = []
    left_out: list[tuple[str, Rejection]] = []
    for number, group in enumerate(groups):
        out = list(group.rejected)
        kept = []
        for trajectory in group.trajectories:
            reason = _find_fault(trajectory, version, max_staleness)
            if reason:
                out.append(reject(trajectory, reason))
            else:
                kept.append(trajectory)
        if needs_groups and len(kept) == 1:
            out.append(reject(kept.pop(), "alone in its group"))
        if needs_spread and kept and len({t.reward for t in kept}) == 1:
            out += [reject(trajectory, "no spread") for trajectory in kept]
            kept = []
        reasons = Counter(rejection.reason for rejection in out)
        drops += [Drop(group.request, reason, count) for reason, count in reasons.items()]
        left_out += [(group.request, rejection) for rejection in out]
        if kept:
            trained[group.request] = len(kept)
        trajectories += kept
        numbers += [number] * len(kept)
    return Admitted(tuple(trajectories), tuple(numbers), trained, tuple(drops), tuple(left_out))


def _find_fault(trajectory: Trajectory, version: int, max_staleness: int) -> str | None:
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
