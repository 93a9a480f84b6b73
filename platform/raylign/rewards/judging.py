"""From verdicts to rewards: which completions meet, what both orders say together, and how far
verdicts agree with each other.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

Pair = tuple[int, int]
"""Places of two completions in their group; the first is shown first when only one order is."""


@dataclass(frozen=True, slots=True)
class PairVerdict:
    """What became of one pair."""

    pair: Pair
    share: float | None
    """What the first has of the win, in 0..1; None when there is no verdict."""
    decided: int
    """Samples with a verdict."""
    consistent: int
    """Of those judged in both orders, samples whose two verdicts say the same."""
    contradicted: int
    """Of those judged in both orders, samples whose two verdicts differ: each is a tie."""
    agreement: float | None
    """Of the samples with each other; None of fewer than two."""


@dataclass(frozen=True, slots=True)
class Preference:
    """One completion is better than another."""

    chosen: int
    rejected: int
    margin: float
    """Difference of their shares of the win, in (0, 1]."""


def choose_pairs(count: int, pairs: int, seed: int) -> list[Pair]:
    """Which of `count` completions meet.

    0 `pairs` are a circle: each against the next, so that all meet as many, and each is shown first
    once. Otherwise that many different ones are drawn, all there are at most, of those who have met
    least: half as many pairs as completions are enough for all to be in one. Depends on nothing but
    the arguments.
    """
    drawn = random.Random(seed)
    if count < 2:
        return []
    if pairs == 0 and count > 2:
        return [(place, (place + 1) % count) for place in range(count)]
    free = list(itertools.combinations(range(count), 2))
    drawn.shuffle(free)
    met = [0] * count
    chosen: list[Pair] = []
    for _ in range(min(max(pairs, 1), len(free))):
        best = min(free, key=lambda pair: (max(met[pair[0]], met[pair[1]]), _sum(met, pair)))
        free.remove(best)
        for place in best:
            met[place] += 1
        chosen.append(best if drawn.random() < 0.5 else (best[1], best[0]))
    return chosen


def settle_pair(
    pair: Pair, forward: Sequence[float | None], backward: Sequence[float | None] | None
) -> PairVerdict:
    """One outcome of all verdicts on a pair.

    `forward` has each sample's verdict with the pair in its order (1: the one shown first wins),
    `backward` those with it turned round, None when that was not asked. A win must be said in both
    orders, as by Zheng et al. (2023, arXiv:2306.05685, section 3.4): verdicts that differ are a
    tie. A sample of which one order has no verdict has none: the other may be its position's.
    """
    shares: list[float] = []
    consistent = contradicted = 0
    turned = [None if b is None else 1.0 - b for b in backward] if backward is not None else forward
    for ahead, behind in zip(forward, turned, strict=True):
        if ahead is None or behind is None:
            continue
        if backward is not None:
            consistent += ahead == behind
            contradicted += ahead != behind
        shares.append(ahead if ahead == behind else 0.5)
    share = math.fsum(shares) / len(shares) if shares else None
    return PairVerdict(
        pair, share, len(shares), consistent, contradicted, measure_agreement(shares)
    )


def win_shares(count: int, outcomes: Sequence[PairVerdict]) -> list[float | None]:
    """Each completion's mean share of the pairs it was in, ties half; None without a verdict."""
    own: list[list[float]] = [[] for _ in range(count)]
    for outcome in outcomes:
        if outcome.share is not None:
            own[outcome.pair[0]].append(outcome.share)
            own[outcome.pair[1]].append(1.0 - outcome.share)
    return [math.fsum(shares) / len(shares) if shares else None for shares in own]


def list_preferences(outcomes: Sequence[PairVerdict]) -> list[Preference]:
    """The pairs that have a winner."""
    found = []
    for outcome in outcomes:
        if outcome.share is not None and outcome.share != 0.5:
            first, second = outcome.pair if outcome.share > 0.5 else outcome.pair[::-1]
            found.append(Preference(first, second, abs(2 * outcome.share - 1)))
    return found


def average_marks(marks: Sequence[float | None]) -> float | None:
    """Mean of those that are there."""
    there = [mark for mark in marks if mark is not None]
    return math.fsum(there) / len(there) if there else None


def measure_agreement(values: Sequence[float]) -> float | None:
    """1 - mean distance of two different samples, all in 0..1; None of fewer than two."""
    if len(values) < 2:
        return None
    distances = [abs(a - b) for a, b in itertools.combinations(values, 2)]
    return 1.0 - math.fsum(distances) / len(distances)


def advise_workers(waiting: int, workers: int, least: int, most: int, queue: int) -> int:
    """How many workers there should be with `waiting` calls: one more where each has more than
    `queue` of them, one fewer where there are none at all, between `least` and `most`."""
    if waiting > workers * queue:
        return max(workers, min(workers + 1, most))
    if waiting == 0:
        return min(workers, max(workers - 1, least))
    return workers


class JudgeTally:
    """What happened at the judge since it was last asked."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.calls = self.cache_hits = self.retries = self.abstentions = self.refused = 0
        self.verdicts = 0
        """Asked for: of a completion, or of a pair in one order; each sample counts."""
        self._latency = _Mean()
        self._order, self._contradictions = _Mean(), 0
        self._agreement, self._first = _Mean(), _Mean()

    def answer(self, seconds: float) -> None:
        """A call was answered."""
        self._latency.add(seconds)

    def choice(self, value: float | None) -> None:
        """A verdict on a pair, by the order in which it was shown."""
        if value is not None and value != 0.5:
            self._first.add(value)

    def pair(self, outcome: PairVerdict) -> None:
        """A pair was settled."""
        both = outcome.consistent + outcome.contradicted
        self._order.add(float(outcome.consistent), both)
        self._contradictions += outcome.contradicted
        self.agreement(outcome.agreement)

    def agreement(self, value: float | None) -> None:
        """How far the samples of one completion or pair agreed."""
        if value is not None:
            self._agreement.add(value)

    def take(self) -> dict[str, float]:
        """Counts and means by name, those that are defined; all begin anew."""
        counts = ("calls", "cache_hits", "retries", "abstentions", "refused", "verdicts")
        found = {name: float(getattr(self, name)) for name in counts}
        found["contradictions"] = float(self._contradictions)
        if self.verdicts:
            found["abstain_rate"] = self.abstentions / self.verdicts
        means = {
            "order_consistency": self._order,
            "first_rate": self._first,
            "agreement": self._agreement,
            "latency_s": self._latency,
        }
        found |= {name: mean.total / mean.count for name, mean in means.items() if mean.count}
        self._clear()
        return {f"judge/{name}": value for name, value in found.items()}


@dataclass(slots=True)
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float, count: int = 1) -> None:
        self.total, self.count = self.total + value, self.count + count


def _sum(met: Sequence[int], pair: Pair) -> int:
    return met[pair[0]] + met[pair[1]]
