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
    "repeated_text": "Repeated text",
    "decontaminate": "Decontaminate",
}
HELD_OUT = "held_out"
"""The task of the run's own held-out problems and texts, in the funnel."""
# Reasons of a step that are named, and reasons that have an example in the open.
NAMED, SHOWN = 5, 6


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
        found = _describe_decontamination(funnel["decontamination"], funnel.get("removed", {}))
        blocks.append(Text(found))
    quotes = _quote_examples(funnel)
    if quotes:
        blocks.append(Text("What was taken out", heading=True))
        blocks.append(
            Quotes(
                quotes[:SHOWN],
                "The first document of the most frequent reasons. Filters make mistakes; reading "
                "what they drop is the only way to notice. The data report (python -m "
                "jobs.data_report) shows all reasons, and what other thresholds would do.",
            )
        )
        more = quotes[SHOWN:]
        if more:
            blocks.append(Folded(f"{len(more)} more", (Quotes(more),)))
    return Section(
        key="data",
        title="Data funnel",
        lead="Documents go in at the top; each step may drop some, and says why.",
        blocks=tuple(blocks),
    )


def _quote_examples(funnel: Mapping[str, Any]) -> tuple[Quote, ...]:
    """What was taken out: an example of each reason, the most frequent first; then the others."""
    counts: dict[str, int] = {}
    for step in funnel.get("steps", []):
        counts |= step.get("dropped", {})
    examples = {r: shown for r, shown in funnel.get("examples", {}).items() if r != "kept"}
    ranked = sorted(examples, key=lambda reason: (-counts.get(reason, 0), reason))
    chosen = [(reason, examples[reason][0]) for reason in ranked if examples[reason]]
    chosen += [(reason, found) for reason in ranked for found in examples[reason][1:]]
    return tuple(
        Quote(reason.replace("_", " "), str(found.get("source", "")), str(found.get("text", "")))
        for reason, found in chosen
    )


def _tabulate_steps(steps: list[Mapping[str, Any]]) -> Table:
    widest = max((step["in"] for step in steps), default=0) or 1
    rows = []
    for step in steps:
        lost = step["in"] - step["out"]
        reasons = sorted(step.get("dropped", {}).items(), key=lambda item: (-item[1], item[0]))
        named = [f"{name.replace('_', ' ')} {count:,}" for name, count in reasons if count]
        if named[NAMED + 1 :]:
            named[NAMED:] = [f"and {len(named) - NAMED} reasons more"]
        why = ", ".join(named)
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


def _describe_decontamination(found: Mapping[str, Any], removed: Mapping[str, int]) -> str:
    items = found.get("items", {})
    english = found.get("english_held_out", 0)
    problems = max(0, items.get(HELD_OUT, 0) - english)
    held = [
        *([f"{problems:,} problems of this run"] if problems else []),
        *([f"{english:,} English documents"] if english else []),
        *(f"{n:,} items of {task}" for task, n in sorted(items.items()) if task != HELD_OUT),
    ]
    if not held:
        return "Nothing is held out for evaluation."
    done = []
    if removed.get("held_out_lines"):
        shortened = f" from {removed.get('documents_with_held_out_lines', 0):,} documents"
        done.append(f"{removed['held_out_lines']:,} lines that contained one were cut{shortened}")
    if found.get("documents_removed"):
        done.append(f"{found['documents_removed']:,} documents that contained one were removed")
    left = found.get("overlap_after", 0)
    verdict = "none of them is left in the training text"
    if left:
        verdict = f"{left:,} documents still contain one"
    return (
        f"Protection of the test: {_enumerate(held)} are held out for evaluation. "
        f"{_capitalize('; '.join([*done, f'a second look finds that {verdict}']))}."
    )


def _enumerate(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


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
