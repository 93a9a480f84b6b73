"""The funnel: how many documents left where, why, and what they looked like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from raylign.config import PrepareConfig
from raylign.data.quality.rules import REASONS

STEPS = (
    "read",
    "quality",
    "exact_duplicates",
    "near_duplicates",
    "english_held_out",
    "repeated_text",
    "decontaminate",
)
"""Where a document can leave, in order."""
_REMEDIES = {
    "read": "correct prepare.sources",
    "exact_duplicates": "name other prepare.sources",
    "near_duplicates": "raise prepare.dedup.threshold",
    "english_held_out": "lower prepare.english_held_out_share",
    "repeated_text": "turn off prepare.dedup.lines and prepare.dedup.substring",
    "decontaminate": "lower prepare.textbook.held_out, or shorten prepare.decontaminate.against",
}
EXAMPLES = 3
EXAMPLE_CHARS = 400

Counts = dict[str, Any]
"""Numbers, or such dictionaries."""


@dataclass
class Tally:
    """What was counted over a part of the corpus; `merge` adds the parts up in their order."""

    left: Counts = field(default_factory=dict)
    """Step to documents that left there; "" to those that stayed."""
    dropped: Counts = field(default_factory=dict)
    """Step to reason to count; a document counts once for each of its reasons."""
    sources: Counts = field(default_factory=dict)
    """Source to `read`, `documents` and `chars` (that stayed)."""
    domains: Counts = field(default_factory=dict)
    """Domain to the same."""
    languages: Counts = field(default_factory=dict)
    """Language to the same; empty when it was not measured."""
    lengths: Counts = field(default_factory=dict)
    """Step ("" for kept) to the power of two below the length in characters to documents."""
    contamination: Counts = field(default_factory=dict)
    """Task to `documents` (that held items of it) and `items` (item to documents)."""
    removed: Counts = field(default_factory=dict)
    """What was cut from or replaced in documents that stayed: kind to count."""
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Reason ("kept" for none) to a few excerpts."""
    overlap_after: int = 0
    """Documents that still contain an evaluation item; anything but 0 is a defect."""

    def drop(self, steps: Mapping[str, int], reasons: Mapping[tuple[str, str], int]) -> None:
        """Count documents that left, by step and by (step, reason)."""
        add(self.left, steps)
        for (step, reason), count in reasons.items():
            add(self.dropped, {step: {reason: count}})

    def wants(self, reason: str) -> bool:
        """Whether there are not enough examples yet."""
        return len(self.examples.get(reason, ())) < EXAMPLES

    def show(self, reason: str, example: Mapping[str, Any]) -> None:
        """Remember an example, if there are not enough yet."""
        if self.wants(reason):
            self.examples.setdefault(reason, []).append(dict(example))

    def merge(self, other: Tally) -> None:
        """Add the next part."""
        for name, value in asdict(other).items():
            if name == "examples":
                for reason, shown in value.items():
                    held = self.examples.setdefault(reason, [])
                    held += shown[: EXAMPLES - len(held)]
            elif name == "overlap_after":
                self.overlap_after += value
            else:
                add(getattr(self, name), value)


def add(sums: Counts, more: Mapping[str, Any]) -> None:
    """Add numbers of the same place."""
    for key, value in more.items():
        if isinstance(value, Mapping):
            add(sums.setdefault(key, {}), value)
        else:
            sums[key] = sums.get(key, 0) + value


def tally_reading(reports: Sequence[Mapping[str, Any]]) -> Tally:
    """What the first pass rejected, from its reports."""
    tally = Tally()
    for report in reports:
        if report["documents"] and not report["used"]:
            continue  # beyond the source's limit
        rejected = sum(report["rejected"].values())
        add(tally.left, {"read": rejected} if rejected else {})
        add(tally.dropped, {"read": report["rejected"]} if rejected else {})
        add(tally.sources, {report["source"]: {"read": rejected + report["used"]}})
    return tally


def explain_empty(tally: Tally, config: PrepareConfig) -> str:
    """One line: what became of all documents, and what to change."""
    total = sum(tally.left.values())
    counts = {
        (step, reason): count
        for step, reasons in tally.dropped.items()
        for reason, count in reasons.items()
    }
    step, reason = max(counts, key=lambda key: (counts[key], key))
    if step == "quality":
        key = REASONS[reason]
        value: Any = config.quality
        for name in key.split("."):
            value = getattr(value, name, None)
        remedy = f"relax prepare.quality.{key}={value}"
    else:
        remedy = _REMEDIES[step]
    return (
        f"prepare: none of {total} documents is left; {counts[step, reason]} were rejected "
        f"as {reason!r} in step {step!r}; {remedy}"
    )


def describe(tally: Tally, duplicates: Mapping[str, Any], items: Mapping[str, Any]) -> Counts:
    """What `funnel.json` holds: the tally, `duplicates` and the evaluation `items` looked for."""
    steps = []
    remaining = sum(tally.left.values())
    for name in STEPS:
        left = tally.left.get(name, 0)
        dropped = dict(sorted(tally.dropped.get(name, {}).items()))
        steps.append({"name": name, "in": remaining, "out": remaining - left, "dropped": dropped})
        remaining -= left
    return {
        "steps": steps,
        "sources": _sort(tally.sources),
        "domains": _sort(tally.domains),
        "languages": _sort(tally.languages),
        "lengths": _sort(tally.lengths),
        "duplicates": dict(duplicates),
        "decontamination": dict(items)
        | {
            "tasks": _sort(tally.contamination),
            "documents_removed": tally.left.get("decontaminate", 0),
            "documents_shortened": tally.removed.get("documents_with_held_out_lines", 0),
            "lines_removed": tally.removed.get("held_out_lines", 0),
            "english_held_out": tally.left.get("english_held_out", 0),
            "overlap_after": tally.overlap_after,
        },
        "removed": _sort(tally.removed),
        "examples": dict(sorted(tally.examples.items())),
    }


def _sort(counts: Counts) -> Counts:
    return {
        key: _sort(value) if isinstance(value, dict) else value
        for key, value in sorted(counts.items())
    }


def summarise(tally: Tally) -> Counts:
    """The numbers worth showing."""
    return {
        "read": sum(tally.left.values()),
        "documents": tally.left.get("", 0),
        "chars": sum(source.get("chars", 0) for source in tally.sources.values()),
        "rejected": tally.left.get("read", 0),
        "low_quality": tally.left.get("quality", 0),
        "exact_duplicates": tally.left.get("exact_duplicates", 0),
        "near_duplicates": tally.left.get("near_duplicates", 0),
        "contaminated": tally.left.get("decontaminate", 0),
        "lines_removed": tally.removed.get("held_out_lines", 0),
    }
