"""What the model was fed: the data funnel and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raylign.evaluation.report.document import (
    Block,
    Cell,
    Fact,
    Facts,
    Quote,
    Quotes,
    Section,
    Table,
    Text,
)
from raylign.evaluation.report.figures import MINUS, show_count, show_number, show_percent
from raylign.evaluation.report.findings import Findings

EXAMPLES_PER_REASON = 2


def build_funnel(findings: Findings) -> Section | None:
    """Documents kept and dropped, with the reasons."""
    funnel = findings.funnel
    if not funnel:
        return None
    blocks: list[Block] = []
    steps = funnel.get("steps", [])
    if steps:
        blocks.append(_tabulate_steps(steps))
    if funnel.get("sources"):
        blocks.append(Text("Where the text comes from", heading=True))
        blocks.append(_tabulate_sources(funnel["sources"]))
    if funnel.get("decontamination"):
        blocks.append(Text(_describe_decontamination(funnel["decontamination"])))
    quotes = [
        Quote(reason.replace("_", " "), str(found.get("source", "")), str(found.get("text", "")))
        for reason, examples in sorted(funnel.get("examples", {}).items())
        for found in examples[:EXAMPLES_PER_REASON]
    ]
    if quotes:
        blocks.append(Text("What was thrown away", heading=True))
        blocks.append(
            Quotes(
                tuple(quotes),
                "Real dropped documents, one card each. Filters make "
                "mistakes; reading what they drop is the only way to notice.",
            )
        )
    return Section(
        key="data",
        title="Data funnel",
        lead="Documents go in at the top; each step may drop some, and says why.",
        blocks=tuple(blocks),
    )


def _tabulate_steps(steps: list[Mapping[str, Any]]) -> Table:
    widest = max((step["in"] for step in steps), default=0) or 1
    rows = []
    for step in steps:
        lost = step["in"] - step["out"]
        reasons = sorted(step.get("dropped", {}).items(), key=lambda item: (-item[1], item[0]))
        why = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in reasons if count)
        rows.append(
            (
                Cell(str(step["name"]).replace("_", " ")),
                Cell(f"{step['in']:,}"),
                Cell(f"{step['out']:,}", share=step["out"] / widest),
                Cell(
                    f"{MINUS}{lost:,}" if lost > 0 else "0", tone="plain" if lost > 0 else "muted"
                ),
                Cell(why or "nothing", tone="plain" if why else "muted"),
            )
        )
    return Table(
        head=("Step", "In", "Kept", "Dropped", "Why"),
        rows=tuple(rows),
        numeric=frozenset({1, 2, 3}),
        caption="Bars show what is left of the documents that entered. "
        "A document with several faults counts under each of them.",
    )


def _tabulate_sources(sources: Mapping[str, Mapping[str, Any]]) -> Table:
    total = sum(int(s.get("chars", 0)) for s in sources.values()) or 1
    ranked = sorted(sources.items(), key=lambda item: (-int(item[1].get("chars", 0)), item[0]))
    rows = tuple(
        (
            Cell(name),
            Cell(f"{int(found.get('documents', 0)):,}"),
            Cell(f"{int(found.get('chars', 0)):,}"),
            Cell(
                show_percent(int(found.get("chars", 0)) / total),
                share=int(found.get("chars", 0)) / total,
            ),
        )
        for name, found in ranked
    )
    return Table(
        head=("Source", "Documents", "Characters", "Share of text"),
        rows=rows,
        numeric=frozenset({1, 2, 3}),
        caption="After all filters.",
    )


def _describe_decontamination(found: Mapping[str, Any]) -> str:
    left = found.get("overlap_after", 0)
    verdict = (
        "afterwards not one of them is left in the training text"
        if not left
        else f"afterwards {left:,} are still found in it"
    )
    return (
        f"Protection of the test: {found.get('held_out', 0):,} problems are held out for "
        f"evaluation. {found.get('documents_removed', 0):,} documents that contained one were "
        f"removed; {verdict}."
    )


def build_tokenizer(findings: Findings) -> Section | None:
    """Vocabulary and compression."""
    if "tokenizer" not in findings.stages:
        return None
    facts = []
    if findings.vocabulary:
        facts.append(Fact("Vocabulary", show_count(findings.vocabulary), "different tokens"))
    for name, value in findings.stages["tokenizer"].summary.items():
        if isinstance(value, int | float) and name not in ("vocab_size", "vocabulary"):
            facts.append(Fact(name.replace("_", " ").capitalize(), show_number(value)))
    splits = findings.shards.get("splits", {})
    for name, split in splits.items():
        note = f"in {split['rows']:,} rows of {findings.shards.get('sequence_length', 0):,}"
        facts.append(Fact(f"{name.capitalize()} tokens", show_count(split["tokens"]), note))
    blocks: list[Block] = [Facts(tuple(facts))] if facts else []
    table = _tabulate_tokenizers(findings.tokenizers)
    if table is not None:
        blocks.append(table)
    return Section(
        key="tokenizer",
        title="Tokenizer",
        lead="Models read tokens, not letters. The fewer tokens a text needs, the more of it fits "
        "into the same computation.",
        blocks=tuple(blocks),
    )


def _tabulate_tokenizers(comparison: Any) -> Table | None:
    """Rows of the comparison, whatever numbers it holds: a list, or a mapping by name."""
    if isinstance(comparison, Mapping):
        comparison = comparison.get("rows", comparison.get("tokenizers", comparison))
    if isinstance(comparison, Mapping):
        comparison = [
            {"name": k} | dict(v) for k, v in comparison.items() if isinstance(v, Mapping)
        ]
    rows = [row for row in comparison if isinstance(row, Mapping)] if comparison else []
    if not rows:
        return None
    keys = [k for k, v in rows[0].items() if isinstance(v, str | int | float)]
    keys.sort(key=lambda key: not isinstance(rows[0][key], str))
    return Table(
        head=tuple(key.replace("_", " ").capitalize() for key in keys),
        rows=tuple(tuple(_show_value(row.get(key)) for key in keys) for row in rows),
        numeric=frozenset(i for i, key in enumerate(keys) if not isinstance(rows[0][key], str)),
        caption="Compared on text of this run's corpus.",
    )


def _show_value(value: Any) -> Cell:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Cell("" if value is None else str(value))
    return Cell(show_count(value) if isinstance(value, int) else show_number(value))
