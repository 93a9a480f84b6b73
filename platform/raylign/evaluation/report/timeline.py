"""Who did what when: overlap and utilisation from the spans that actors recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# An actor that does two things at once is shown doing the first of these.
ACTIVITIES = ("sync", "save", "learn", "generate", "score", "wait")
# What befalls an actor at one moment: trouble, and what happens to all of them when all is well.
TROUBLE = frozenset(
    {"lost", "late", "sink_off", "journal_lost", "collapse", "diverged", "left_out"}
)
ORDINARY = frozenset({"started", "serves"})

Spans = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Event:
    """One activity of one actor; times in seconds since the epoch."""

    actor: str
    what: str
    start: float
    end: float
    step: int | None


def merge_spans(spans: Iterable[tuple[float, float]]) -> Spans:
    """The union of intervals, as disjoint intervals in order."""
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def measure(spans: Spans) -> float:
    """Total length of disjoint intervals."""
    return sum(end - start for start, end in spans)


def intersect_spans(first: Spans, second: Spans) -> Spans:
    """Where both of two lists of disjoint, ordered intervals are present."""
    common: Spans = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            common.append((start, end))
        if first[i][1] <= second[j][1]:
            i += 1
        else:
            j += 1
    return common


def subtract_spans(first: Spans, second: Spans) -> Spans:
    """The parts of `first` outside `second`; both disjoint and ordered."""
    left: Spans = []
    for start, end in first:
        for low, high in second:
            if high <= start or low >= end:
                continue
            if low > start:
                left.append((start, low))
            start = max(start, high)
            if start >= end:
                break
        if start < end:
            left.append((start, end))
    return left


def find_extent(events: Sequence[Event]) -> tuple[float, float]:
    """Begin of the first and end of the last piece of work; moments count only where there is none,
    since a worker is started long before it can work."""
    work = [event for event in events if event.end > event.start] or events
    return min(event.start for event in work), max(event.end for event in work)


def measure_overlap(events: Sequence[Event]) -> tuple[float, float]:
    """Seconds in which some actor generates while some actor learns, and seconds of learning."""
    generating = merge_spans((e.start, e.end) for e in events if e.what == "generate")
    learning = merge_spans((e.start, e.end) for e in events if e.what == "learn")
    return measure(intersect_spans(generating, learning)), measure(learning)


def measure_shares(events: Sequence[Event]) -> dict[str, dict[str, float]]:
    """For each actor, the share of the whole run spent in each activity; the rest is idle."""
    if not events:
        return {}
    begun, ended = find_extent(events)
    total = ended - begun
    shares: dict[str, dict[str, float]] = {}
    done: dict[tuple[str, str], Spans] = {}
    for event in events:
        done.setdefault((event.actor, event.what), []).append((event.start, event.end))
    for actor in order_actors(events):
        covered: Spans = []
        shares[actor] = {}
        for what in ACTIVITIES:
            spans = merge_spans(done.get((actor, what), ()))
            fresh = subtract_spans(spans, covered)
            if fresh and total > 0:
                shares[actor][what] = measure(fresh) / total
            covered = merge_spans([*covered, *fresh])
    return shares


def order_actors(events: Sequence[Event]) -> list[str]:
    """Those that generate, then score, then learn, then others; by name within."""
    rank = {"generate": 0, "score": 1, "learn": 2}
    best: dict[str, int] = {}
    for event in events:
        best[event.actor] = min(best.get(event.actor, 3), rank.get(event.what, 3))
    return sorted(best, key=lambda actor: (best[actor], actor))


def choose_window(events: Sequence[Event], steps: int = 4) -> tuple[float, float]:
    """Begin and end of a window around `steps` learning steps in the middle of the run."""
    begun: dict[int, float] = {}
    for event in events:
        if event.what == "learn" and event.step is not None:
            begun[event.step] = min(event.start, begun.get(event.step, event.start))
    starts = sorted(begun.values())
    if len(starts) <= steps:
        return find_extent(events)
    first = max(0, (len(starts) - steps) // 2)
    start, end = starts[first], starts[first + steps]
    margin = 0.04 * (end - start)
    return start - margin, end + margin
