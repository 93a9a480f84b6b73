"""The funnel: how many documents left where, why, and what they looked like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raylign.config import PrepareConfig
from raylign.data.decontamination.index import Index
from raylign.data.quality.rules import KEYS
from raylign.data.textbook.problems import Problems

STEPS = (
    "read",
    "clean",
    "quality",
    "exact_duplicates",
    "near_duplicates",
    "english_held_out",
    "decontaminate",
)
"""Where a document can leave, in order."""
_REMEDIES = {
    "read": "correct prepare.sources",
    "clean": "name other prepare.sources",
    "exact_duplicates": "name other prepare.sources",
    "near_duplicates": "raise prepare.dedup.threshold",
    "english_held_out": "lower prepare.english_held_out_share",
    "decontaminate": "lower prepare.textbook.held_out",
}
EXAMPLES = 3
EXAMPLE_CHARS = 300


@dataclass
class Tally:
    """What one part of the second pass did; `merge` adds parts up in their order."""

    left: dict[str, int] = field(default_factory=dict)
    """Stage to documents that left there; "" to those that stayed."""
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    """Stage to reason to count."""
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """Source to `documents` and `chars` that stayed."""
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """Reason to a few excerpts."""
    lines_removed: int = 0
    documents_shortened: int = 0
    overlap_after: int = 0
    """Documents that still contain an evaluation item; anything but 0 is a defect."""

    def drop(self, stage: str, reasons: Sequence[str], source: str, text: str) -> None:
        """Count a document that leaves."""
        self.left[stage] = self.left.get(stage, 0) + 1
        counts = self.dropped.setdefault(stage, {})
        for reason in reasons:
            counts[reason] = counts.get(reason, 0) + 1
            self.show(reason, source, text)

    def keep(self, source: str, chars: int) -> None:
        """Count a document that stays."""
        self.left[""] = self.left.get("", 0) + 1
        counts = self.sources.setdefault(source, {"documents": 0, "chars": 0})
        counts["documents"] += 1
        counts["chars"] += chars

    def show(self, reason: str, source: str, text: str) -> None:
        """Remember an example, if there are not enough yet."""
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            shown.append({"source": source, "text": text[:EXAMPLE_CHARS]})

    def merge(self, other: Tally) -> None:
        """Add the next part."""
        self.left = dict(Counter(self.left) + Counter(other.left))
        for mine, theirs in ((self.dropped, other.dropped), (self.sources, other.sources)):
            for name, counts in theirs.items():
                sums = mine.setdefault(name, {})
                for key, count in counts.items():
                    sums[key] = sums.get(key, 0) + count
        for reason, shown in other.examples.items():
            held = self.examples.setdefault(reason, [])
            held += shown[: EXAMPLES - len(held)]
        self.lines_removed += other.lines_removed
        self.documents_shortened += other.documents_shortened
        self.overlap_after += other.overlap_after


def explain_empty(tally: Tally, config: PrepareConfig) -> str:
    """One line: what became of all documents, and what to change."""
    total = sum(tally.left.values())
    counts = {
        (stage, reason): count
        for stage, reasons in tally.dropped.items()
        for reason, count in reasons.items()
    }
    stage, reason = max(counts, key=lambda key: (counts[key], key))
    if stage == "quality":
        key = KEYS[reason]
        remedy = f"relax prepare.quality.{key}={getattr(config.quality, key)}"
    else:
        remedy = _REMEDIES[stage]
    return (
        f"prepare: none of {total} documents is left; {counts[stage, reason]} were rejected "
        f"as {reason!r} in step {stage!r}; {remedy}"
    )


def describe(
    tally: Tally, problems: Problems, index: Index, config: PrepareConfig
) -> dict[str, Any]:
    """What `funnel.json` holds. A document counts once for each of its reasons."""
    steps = []
    remaining = sum(tally.left.values())
    for name in STEPS:
        left = tally.left.get(name, 0)
        dropped = dict(sorted(tally.dropped.get(name, {}).items()))
        steps.append({"name": name, "in": remaining, "out": remaining - left, "dropped": dropped})
        remaining -= left
    return {
        "steps": steps,
        "sources": dict(sorted(tally.sources.items())),
        "examples": dict(sorted(tally.examples.items())),
        "decontamination": {
            "held_out": len(problems.held_out),
            "english_held_out": tally.left.get("english_held_out", 0),
            "ngrams": index.entries,
            "items_ignored": index.ignored,
            "granularity": config.decontaminate.granularity,
            "documents_removed": tally.left.get("decontaminate", 0),
            "documents_shortened": tally.documents_shortened,
            "lines_removed": tally.lines_removed,
            "overlap_after": tally.overlap_after,
        },
    }


def summarise(tally: Tally, problems: Problems) -> dict[str, Any]:
    """The numbers worth showing."""
    return {
        "read": sum(tally.left.values()),
        "documents": tally.left.get("", 0),
        "chars": sum(source["chars"] for source in tally.sources.values()),
        "low_quality": tally.left.get("quality", 0),
        "exact_duplicates": tally.left.get("exact_duplicates", 0),
        "near_duplicates": tally.left.get("near_duplicates", 0),
        "held_out_lines_removed": tally.lines_removed,
        "exercises": len(problems.exercises),
        "prompts": len(problems.prompts),
        "held_out": len(problems.held_out),
    }
