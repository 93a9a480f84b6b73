"""What the model was fed: the data funnel and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raylign.evaluation.report.document import (
    Block,
    Cell,
    Fact,
    Facts,
    Folded,
    Quote,
    Quotes,
    Section,
    Table,
    Text,
)
from raylign.evaluation.report.figures import MINUS, show_count, show_number, show_percent
from raylign.evaluation.report.findings import Findings

STEP_NAMES = {
    "read": "Read",
    "clean": "Clean",
    "quality": "Quality filters",
    "exact_duplicates": "Exact duplicates",
    "near_duplicates": "Near duplicates",
    "english_held_out": "Held out for evaluation",
    "decontaminate": "Decontaminate",
}


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
    examples = funnel.get("examples", {})
    first = _quote_examples(examples, slice(0, 1))
    if first:
        blocks.append(Text("What was taken out", heading=True))
        blocks.append(
            Quotes(
                first,
                "The first document of each reason. Filters make mistakes; reading what they "
                "drop is the only way to notice.",
            )
        )
        more = _quote_examples(examples, slice(1, None))
        if more:
            blocks.append(Folded(f"{len(more)} more", (Quotes(more),)))
    return Section(
        key="data",
        title="Data funnel",
        lead="Documents go in at the top; each step may drop some, and says why.",
        blocks=tuple(blocks),
    )


def _quote_examples(
    examples: Mapping[str, list[Mapping[str, Any]]], which: slice
) -> tuple[Quote, ...]:
    return tuple(
        Quote(reason.replace("_", " "), str(found.get("source", "")), str(found.get("text", "")))
        for reason, shown in sorted(examples.items())
        for found in shown[which]
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
                Cell(STEP_NAMES.get(step["name"], str(step["name"]).replace("_", " "))),
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
    held = f"{found.get('held_out', 0):,} problems"
    if found.get("english_held_out"):
        held += f" and {found['english_held_out']:,} English documents"
    done = []
    if found.get("lines_removed"):
        shortened = f" from {found['documents_shortened']:,} documents"
        done.append(f"{found['lines_removed']:,} lines that contained one were cut{shortened}")
    if found.get("documents_removed"):
        done.append(f"{found['documents_removed']:,} documents that contained one were removed")
    left = found.get("overlap_after", 0)
    verdict = "none of them is left in the training text"
    if left:
        verdict = f"{left:,} documents still contain one"
    return (
        f"Protection of the test: {held} are held out for evaluation. "
        f"{_capitalize('; '.join([*done, f'a second look finds that {verdict}']))}."
    )


def _capitalize(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def build_tokenizer(findings: Findings) -> Section | None:
    """Vocabulary and compression."""
    if "tokenizer" not in findings.stages:
        return None
    facts = []
    if findings.vocabulary:
        facts.append(Fact("Vocabulary", show_count(findings.vocabulary), "different tokens"))
    rows = [row for row in findings.tokenizers if isinstance(row, Mapping)]
    if rows and "bytes_per_token" in rows[0]:
        bytes_each = show_number(float(rows[0]["bytes_per_token"]))
        facts.append(Fact("Compression", f"{bytes_each} bytes", "of text in a token"))
    for name, split in findings.shards.get("splits", {}).items():
        note = f"in {split['rows']:,} rows of {findings.shards.get('sequence_length', 0):,}"
        facts.append(Fact(f"{name.capitalize()} tokens", show_count(split["tokens"]), note))
    blocks: list[Block] = [Facts(tuple(facts))] if facts else []
    if rows:
        blocks.append(_tabulate_tokenizers(rows))
    return Section(
        key="tokenizer",
        title="Tokenizer",
        lead="Models read tokens, not letters. The more text a token holds, the more of it fits "
        "into the same computation.",
        blocks=tuple(blocks),
    )


def _tabulate_tokenizers(rows: list[Mapping[str, Any]]) -> Table:
    names = {"bpe": "This run's, byte-level BPE"}
    longest = max(float(row.get("bytes_per_token", 0.0)) for row in rows) or 1.0
    cells = []
    for row in rows:
        held = float(row.get("bytes_per_token", 0.0))
        name = str(row.get("name", ""))
        cells.append(
            (
                Cell(names.get(name, name.capitalize())),
                Cell(f"{int(row.get('vocab_size', 0)):,}"),
                Cell(show_number(held), share=held / longest),
                Cell(show_percent(float(row.get("unknown_rate", 0.0)))),
                Cell(show_percent(float(row.get("round_trip", 0.0)), 0)),
            )
        )
    return Table(
        head=("Tokenizer", "Entries", "Bytes a token", "Unknown tokens", "Texts restored exactly"),
        rows=tuple(cells),
        numeric=frozenset({1, 2, 3, 4}),
        caption="On documents that none of them was trained on. Plain vocabularies of the same "
        "size lose what they do not know; bytes know everything.",
    )
