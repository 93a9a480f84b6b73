"""Chapters about documents: the funnel, what they are, and which of them say the same."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from raylign.data.corpus.funnel import STEPS
from raylign.data.report.blocks import (
    Card,
    Chapter,
    Fold,
    Funnel,
    Histograms,
    Pair,
    Pairs,
    Reason,
    Shown,
    Step,
)
from raylign.data.report.plots import Histogram, Mark
from raylign.data.report.wording import Data, clip, show_origin, spell
from raylign.evaluation.report.corpora import STEP_NAMES
from raylign.evaluation.report.document import Cell, Fact, Facts, Table, Text
from raylign.evaluation.report.figures import show_count, show_percent

GROUP_TITLES = {"sources": "Sources", "domains": "Domains", "languages": "Languages"}
# Rows of a group in the open.
OPEN_ROWS = 15


def build_funnel(data: Data, targets: Mapping[str, str]) -> Chapter | None:
    """Documents by step and reason, and how long those are that stay or leave."""
    if not data["steps"]:
        return None
    steps = []
    for step in data["steps"]:
        reasons = tuple(
            Reason(
                spell(found["reason"]),
                found["count"],
                _show_setting(found["key"], found["value"]),
                targets.get(found["reason"], ""),
            )
            for found in step["reasons"]
        )
        title = STEP_NAMES.get(step["name"], spell(step["name"]).capitalize())
        steps.append(Step(title, step["in"], step["out"], reasons))
    blocks: list[Shown] = [
        Funnel(
            tuple(steps),
            "Green stays, red leaves at the step. A document with several faults counts under each "
            "of them, so reasons may add up to more than left. A reason leads to its examples.",
        )
    ]
    lengths = _plot_lengths(data["lengths"])
    if lengths:
        blocks += [Text("How long they are", heading=True), Histograms(lengths)]
    return Chapter(
        "funnel",
        "Funnel",
        "Records go in at the top; each step may take some out, and says why.",
        tuple(blocks),
    )


def _show_setting(key: str | None, value: Any) -> str:
    if key is None:
        return ""
    shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else f"{value}"
    return f"{key} {shown}"


def _plot_lengths(lengths: Mapping[str, Mapping[str, int]]) -> tuple[Histogram, ...]:
    """All documents, then those of each step at which some left."""
    powers = sorted({int(power) for counts in lengths.values() for power in counts})
    if not powers:
        return ()
    span = range(powers[0], powers[-1] + 1)
    edges = tuple(2.0**power for power in (*span, powers[-1] + 1))

    def count(steps: list[str]) -> tuple[int, ...]:
        return tuple(sum(lengths[step].get(f"{power:02d}", 0) for step in steps) for power in span)

    everything = Histogram(
        "All documents",
        edges,
        count(list(lengths)),
        count([step for step in lengths if not step]),
        "Characters in a document. Each bar is twice as wide as the one before.",
        x_label="characters",
    )
    gone = [
        Histogram(
            f"Left at: {STEP_NAMES.get(step, spell(step)).lower()}",
            edges,
            count([step]),
            None,
            f"{sum(lengths[step].values()):,} documents.",
            x_label="characters",
            color="bad",
        )
        for step in [*(s for s in STEPS if s in lengths), *sorted(lengths.keys() - set(STEPS))]
        if step
    ]
    return (everything, *gone)


def build_composition(data: Data, targets: Mapping[str, str]) -> Chapter | None:
    """Sources, domains and languages: what was read against what stayed."""
    blocks: list[Shown] = []
    for name, title in GROUP_TITLES.items():
        rows = data["groups"][name]
        if not rows or (name == "domains" and _repeat(rows, data["groups"]["sources"])):
            continue
        blocks.append(Text(title, heading=True))
        total = sum(row["chars"] for row in rows)
        cells = tuple(_compose_row(row, total) for row in rows)
        blocks.append(_tabulate_group(cells[:OPEN_ROWS], title))
        if cells[OPEN_ROWS:]:
            rest = _tabulate_group(cells[OPEN_ROWS:], title)
            blocks.append(Fold(f"{len(cells) - OPEN_ROWS} more", (rest,)))
    if not blocks:
        return None
    lead = "What was read, and what of it stays. The last column is what a model will see most of."
    return Chapter("composition", "Composition", lead, tuple(blocks))


def _repeat(domains: list[Data], sources: list[Data]) -> bool:
    """Whether each source is its own domain, so that its rows say nothing new."""
    names = ("name", "documents", "chars")
    mine, theirs = ({tuple(row[n] for n in names) for row in g} for g in (domains, sources))
    return mine == theirs


def _compose_row(row: Data, total: int) -> tuple[Cell, ...]:
    kept = row["documents"] / row["read"] if row["read"] else 0.0
    share = row["chars"] / total if total else 0.0
    return (
        Cell(clip(row["name"])),
        Cell(f"{row['read']:,}"),
        Cell(f"{row['documents']:,}", tone="plain" if row["documents"] else "muted"),
        Cell(show_percent(kept), share=kept, color="rl"),
        Cell(show_count(row["chars"])),
        Cell(show_percent(share), share=share, color="base"),
    )


def _tabulate_group(rows: tuple[tuple[Cell, ...], ...], title: str) -> Table:
    head = (title[:-1], "Read", "Kept", "Of those read", "Characters kept", "Of all kept text")
    caption = "Read: every record of a source, rejected ones as well." if title == "Sources" else ""
    return Table(head=head, rows=rows, numeric=frozenset({1, 2, 3, 4, 5}), caption=caption)


def build_duplicates(data: Data, targets: Mapping[str, str]) -> Chapter | None:
    """Clusters by size, similarities, and pairs to read."""
    found = data["duplicates"]
    if not found:
        return None
    clusters = {int(size): count for size, count in found.get("clusters", {}).items()}
    dropped = sum((size - 1) * count for size, count in clusters.items())
    facts = (
        Fact("Clusters", f"{sum(clusters.values()):,}", "kept documents that stand for others"),
        Fact("Duplicates", f"{dropped:,}", "documents that have a kept one like them"),
        Fact("Largest cluster", f"{max(clusters, default=0):,}", "documents"),
        Fact(
            "Similar pairs",
            f"{found.get('verified', 0):,}",
            f"verified, of {found.get('candidates', 0):,} that share a band",
        ),
    )
    plots = [p for p in (_plot_clusters(clusters), _plot_similarity(data)) if p is not None]
    blocks: list[Shown] = [Facts(facts)]
    if plots:
        blocks.append(Histograms(tuple(plots)))
    if found["pairs"]:
        blocks.append(Text("Pairs to judge the threshold by", heading=True))
        blocks.append(
            Pairs(
                tuple(map(_show_pair, found["pairs"])),
                "The least similar pairs come first: if they are different texts, raise "
                "prepare.dedup.threshold. Each begins shortly before the first difference; words "
                "that the other text lacks are marked.",
            )
        )
    lead = "Of documents that say the same, one stays and stands for the others."
    return Chapter("duplicates", "Duplicates", lead, tuple(blocks))


def _plot_clusters(clusters: Mapping[int, int]) -> Histogram | None:
    if len(clusters) < 2:
        return None
    largest = max(clusters)
    whole = largest <= 20
    edges = [float(n) for n in range(2, largest + 2)] if whole else [2.0]
    while edges[-1] <= largest:
        edges.append(edges[-1] * 2)
    counts = [
        sum(count for size, count in clusters.items() if low <= size < high)
        for low, high in itertools.pairwise(edges)
    ]
    return Histogram(
        "Clusters by size",
        tuple(edges),
        tuple(counts),
        None,
        "Clusters of so many documents, the one that stays included.",
        x_label="documents in a cluster",
        whole=whole,
        unit="clusters",
    )


def _plot_similarity(data: Data) -> Histogram | None:
    counts = data["duplicates"]["similarity"]
    if not any(counts):
        return None
    settings = data["settings"].get("corpus", {}).get("prepare", {})
    threshold = settings.get("dedup", {}).get("threshold")
    low = min(n for n, count in enumerate(counts) if count)
    if threshold is not None:
        low = min(low, max(0, int(threshold * len(counts)) - 1))
    edges = tuple(n / len(counts) for n in range(low, len(counts) + 1))
    marks = (Mark(threshold, f"threshold {threshold:g}"),) if threshold is not None else ()
    return Histogram(
        "Near duplicates by similarity",
        edges,
        tuple(counts[low:]),
        None,
        "Estimated Jaccard similarity to the document that stays. Few pairs just above the "
        "threshold mean that it hardly matters where it is.",
        marks,
        x_label="similarity",
        color="bad",
    )


def _show_pair(pair: Data) -> Pair:
    exact = pair["stage"] == "exact_duplicates"
    title = "Exact duplicate" if exact else f"Similarity {pair['similarity']:.2f}"
    kept = pair["kept"]
    missing = f"document {pair['duplicate_of']} is not in this run"
    right = (
        Card("The one that stays", "", "", missing)
        if kept is None
        else _show_side(
            "The one that stays", kept, "" if kept["where"] == "kept" else kept["where"]
        )
    )
    note = "equal but for case and white space" if exact else ""
    return Pair(title, note, _show_side("Dropped", pair["dropped"], ""), right)


def _show_side(label: str, side: Data, note: str) -> Card:
    shown = side["skipped"] + len(side["text"])
    changed = tuple((start, end) for start, end in side["changed"])
    more = side["chars"] - shown
    return Card(label, show_origin(side), side["text"], note, changed, side["skipped"], more)
