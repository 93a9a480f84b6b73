"""Chapters about evaluation items, and about what was cut from documents that stayed."""

from __future__ import annotations

from collections.abc import Mapping

from raylign.data.report.blocks import Card, Cards, Chapter, Shown
from raylign.data.report.wording import CUTS, Data, clip, show_origin, spell
from raylign.evaluation.report.document import Cell, Table, Text
from raylign.evaluation.report.figures import show_percent

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
    return "This run's own held-out set" if task == "held_out" else task


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
