"""Pure functions that shape a reward, and the running scale of all rewards so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass


def penalise_length(tokens: int, longest: int, margin: int) -> float:
    """Soft overlong punishment (DAPO, arXiv:2503.14476, eq. 13), in [-1, 0], to be added.

    0 up to `longest - margin` tokens, then falling linearly to -1 at `longest`, and -1 beyond.
    Raises `ValueError` unless 0 < margin <= longest.
    """
    if not 0 < margin <= longest:
        raise ValueError(f"margin={margin} must be in 1..{longest}, the longest length")
    return clip_reward((longest - margin - tokens) / margin, -1.0, 0.0)


def charge_length(tokens: int, price: float) -> float:
    """-price for each of `tokens`, to be added. Raises `ValueError` for numbers below 0."""
    if tokens < 0 or price < 0:
        raise ValueError(f"tokens={tokens} and price={price} must not be below 0")
    return -price * tokens


def clip_reward(reward: float, low: float, high: float) -> float:
    """`reward`, but at least `low` and at most `high`. Raises `ValueError` unless low <= high."""
    if low > high:
        raise ValueError(f"low={low} exceeds high={high}")
    return min(max(reward, low), high)


# Less than this share of the mean is what rounding leaves of rewards that are all the same.
_LEAST_DEVIATION = 1e-9


@dataclass(frozen=True, slots=True)
class RunningScale:
    """Moments of all rewards so far, which bring the next ones to about unit deviation.

    The mean stays where it is: a baseline is the algorithm's business, and a reward of 0 keeps its
    sign. Immutable, and equal after `to_dict` and `from_dict`, so that a checkpoint restores it.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    """Sum of squared distances from the mean."""

    def include(self, rewards: Iterable[float]) -> RunningScale:
        """With a batch of `rewards` more (Chan et al. 1979, eq. 2.1, as stable as Welford 1962).

        The batch's own moments are summed exactly, so their order does not matter. Raises
        `ValueError` for a reward that is not finite.
        """
        batch = list(rewards)
        if not all(math.isfinite(reward) for reward in batch):
            raise ValueError("a reward is not finite; reject such samples beforehand")
        if not batch:
            return self
        mean = math.fsum(batch) / len(batch)
        m2 = math.fsum((reward - mean) ** 2 for reward in batch)
        return self.merge(RunningScale(len(batch), mean, m2))

    def merge(self, other: RunningScale) -> RunningScale:
        """The moments of both."""
        count = self.count + other.count
        if not count:
            return self
        gap = other.mean - self.mean
        return RunningScale(
            count,
            self.mean + gap * other.count / count,
            self.m2 + other.m2 + gap**2 * self.count * other.count / count,
        )

    @property
    def deviation(self) -> float:
        """Sample standard deviation (n - 1); 0 of fewer than two, and of rewards all the same."""
        found = math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 0.0
        return found if found > _LEAST_DEVIATION * abs(self.mean) else 0.0

    def scale(self, reward: float) -> float:
        """`reward` over the deviation; as it is as long as there is none."""
        return reward / self.deviation if self.deviation > 0 else reward

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, float]) -> RunningScale:
        """What `to_dict` gave."""
        return cls(int(state["count"]), float(state["mean"]), float(state["m2"]))
