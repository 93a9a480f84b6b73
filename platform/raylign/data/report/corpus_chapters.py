"""Parts of the page about documents: the funnel, what is in it, rules, duplicates, evaluation."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from raylign.data.corpus.funnel import STEPS
from raylign.data.report.blocks import (
    Card,
    Cards,
    Chapter,
    Fold,
    Funnel,
    Histograms,
    Pair,
    Pairs,
    Reason,
    Shown,
    Step,
    visible,
)
from raylign.data.report.plots import Histogram, Mark
from raylign.evaluation.report.corpora import STEP_NAMES
from raylign.evaluation.report.document import Cell, Fact, Facts, Table, Text
from raylign.evaluation.report.figures import show_count, show_percent

Data = Mapping[str, Any]

GROUP_TITLES = {"sources": "Sources", "domains": "Domains", "languages": "Languages"}
# Rows of a group in the open.
OPEN_ROWS = 15
NAME_CHARS = 60
DUPLICATES = {"exact_duplicate", "near_duplicate"}
CUTS = {
    "held_out_line": "Lines that held an evaluation item",
    "repeated_passage": "Passages that occur elsewhere",
}
"""Examples of what was cut from documents that stayed, rather than of documents that left."""
REMOVED = {
    "held_out_lines": "lines with an evaluation item, cut",
    "documents_with_held_out_lines": "documents that lost such a line and stayed",
    "repeated_passages": "repeated lines or passages, cut",
    "documents_with_repeated_passages": "documents that lost one and stayed",
    "pii_mails": "e-mail addresses, replaced",
    "pii_ips": "IP addresses, replaced",
    "pii_phones": "telephone numbers, replaced",
    "pii_secrets": "keys and tokens, replaced",
    "pii_cards": "credit-card numbers, replaced",
}


def spell(name: str) -> str:
    """A reason or a kind as words."""
    return name.replace("_", " ")


def clip(name: str) -> str:
    """A name that fits into a column."""
    name = visible(name)
    return name if len(name) <= NAME_CHARS else f"{name[: NAME_CHARS - 1]}\N{HORIZONTAL ELLIPSIS}"


def list_targets(data: Data) -> dict[str, str]:
    """Reason to the id of its examples on the page."""
    reasons = sorted({*data["examples"], *(row["reason"] for row in data["rejected"])})
    slugs = (re.sub(r"[^a-z0-9]+", "-", reason.lower()).strip("-") for reason in reasons)
    found = {
        reason: f"why-{number}-{slug}"[:80]
        for number, (reason, slug) in enumerate(zip(reasons, slugs, strict=True))
    }
    if data["duplicates"].get("pairs"):
        found |= dict.fromkeys(DUPLICATES, "duplicates")
    return found


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
    return [[row[n] for n in names] for row in domains] == [
        [row[n] for n in names] for row in sources
    ]


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
    return Table(head=head, rows=rows, numeric=frozenset({1, 2, 3, 4, 5}))


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


def show_origin(row: Data) -> str:
    """Where a document is from."""
    return str(row.get("url") or row.get("origin") or row.get("source") or "")


def build_evaluation(data: Data, targets: Mapping[str, str]) -> Chapter | None:
    """Evaluation items, task by task, and the passages that held them."""
    found = data["decontamination"]
    if not found:
        return None
    blocks: list[Shown] = [Text(_judge_overlap(found))]
    rows = []
    for task in found["tasks"]:
        share = task["occurred"] / task["items"] if task["items"] else 0.0
        most = ", ".join(f"{m['item']} in {m['documents']:,}" for m in task["most"][:3])
        rows.append(
            (
                Cell(clip(_name_task(task["task"])), note=_count_items(task)),
                Cell(f"{task['items']:,}"),
                Cell(f"{task['occurred']:,}", tone="bad" if task["occurred"] else "muted"),
                Cell(show_percent(share), share=share, color="bad"),
                Cell(f"{task['documents']:,}"),
                Cell(most, tone="muted"),
            )
        )
    if rows:
        head = ("Task", "Items", "Occurred", "Share", "Documents", "Most often")
        blocks.append(Table(head=head, rows=tuple(rows), numeric=frozenset({1, 2, 3, 4})))
    for task in found["tasks"]:
        cards = tuple(_show_hit(hit) for hit in task["excerpts"])
        if cards:
            title = f"{_name_task(task['task'])}: documents that went"
            blocks.append(Cards("", title, "", cards))
    blocks += _show_cuts(data, targets, "held_out_line")
    return Chapter(
        "evaluation",
        "Evaluation items",
        "What models are tested on may not be trained on. Every document is searched for every "
        "item, and once more after removal.",
        tuple(blocks),
    )


def _judge_overlap(found: Data) -> str:
    left = found.get("overlap_after", 0)
    verdict = "no document that stays holds an item" if not left else f"{left:,} still hold one"
    how = "The lines that hold one are cut"
    if found.get("granularity") != "line":
        how = "Documents that hold one go as a whole"
    held = found.get("english_held_out", 0)
    own = f" {held:,} documents of this corpus are held out as a test of their own." if held else ""
    return (
        f"A document holds an item when they share {found.get('ngram', '?')} words in a row (all "
        f"words of a shorter item). {how}; afterwards, {verdict}.{own}"
    )


def _count_items(task: Data) -> str:
    return (
        f"{task['occurred']:,} of {task['items']:,} items occurred, in {task['documents']:,} "
        f"document{'' if task['documents'] == 1 else 's'}"
    )


def _name_task(task: str) -> str:
    return "this run's own held-out set" if task == "held_out" else task


def _show_hit(hit: Data) -> Card:
    parts = []
    if hit.get("item_coverage") is not None:
        parts.append(f"has {show_percent(hit['item_coverage'], 0)} of the item's words")
    if hit.get("document_coverage") is not None:
        parts.append(f"which are {show_percent(hit['document_coverage'])} of the document")
    return Card(str(hit["item"]), show_origin(hit), hit["excerpt"], ", ".join(parts))


def build_cuts(data: Data, targets: Mapping[str, str]) -> Chapter | None:
    """What was cut from, or replaced in, documents that stayed."""
    found = {kind: count for kind, count in data["removed"].items() if count}
    if not found:
        return None
    rows = tuple(
        (Cell(REMOVED.get(kind, spell(kind)).capitalize(), note=kind), Cell(f"{count:,}"))
        for kind, count in sorted(found.items(), key=lambda item: _rank_kind(item[0]))
    )
    table = Table(head=("What", "Count"), rows=rows, numeric=frozenset({1}))
    lead = "These documents stayed, but are not what they were."
    blocks: tuple[Shown, ...] = (table, *_show_cuts(data, targets, "repeated_passage"))
    return Chapter("cuts", "Cut and replaced", lead, blocks)


def _rank_kind(kind: str) -> tuple[int, str]:
    known = list(REMOVED)
    return (known.index(kind) if kind in known else len(known), kind)


def _show_cuts(data: Data, targets: Mapping[str, str], reason: str) -> list[Shown]:
    examples = data["examples"].get(reason, [])
    cards = tuple(Card(row.get("source") or "", show_origin(row), row["text"]) for row in examples)
    return [Cards(targets[reason], CUTS[reason], "examples", cards)] if cards else []
