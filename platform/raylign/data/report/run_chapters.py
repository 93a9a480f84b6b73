"""Chapters about rules and the run: thresholds, examples, mixture, stages, settings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import yaml

from raylign.data.report.blocks import Card, Cards, Chapter, Fold, Histograms, Shown
from raylign.data.report.material import STAGES
from raylign.data.report.plots import Histogram, Mark, show_edge
from raylign.data.report.wording import CUTS, DUPLICATES, Data, clip, show_origin, spell
from raylign.evaluation.report.document import Cell, Code, Fact, Facts, Table, Text
from raylign.evaluation.report.figures import (
    show_count,
    show_number,
    show_percent,
    show_seconds,
)

HASH_CHARS = 12
OPEN_PLOTS = 9
# Of the thresholds in data.json, those that the page has room for.
CUT_SHARES = ("0.01", "0.05", "0.1", "0.25")


def build_rules(data: Data, targets: Mapping[str, str]) -> Chapter | None:
    """What each rule rejects alone, thresholds for other shares, and the distributions."""
    found = data["signals"]
    if not found:
        return None
    on = [rule for rule in found["rules"] if rule["on"]]
    off = [rule for rule in found["rules"] if not rule["on"]]
    used: dict[str, list[Data]] = {}
    for rule in on:
        used.setdefault(rule["metric"], []).append(rule)
    plots = {m["name"]: _plot_metric(m, used.get(m["name"], []), data) for m in found["metrics"]}
    blocks: list[Shown] = []
    if on:
        on.sort(key=lambda rule: (-(rule["rejects"] or 0), rule["reason"]))
        idle = [rule for rule in on if not rule["rejects"]]
        busy = on[: len(on) - len(idle)]
        if busy:
            blocks.append(_tabulate_rules(busy, found["documents"]))
        if idle:
            title = f"{len(idle)} rules that reject nothing"
            blocks.append(Fold(title, (_tabulate_rules(idle, found["documents"]),)))
    if off:
        title = f"{len(off)} rules that are off, tried at their defaults"
        blocks.append(Fold(title, (_tabulate_rules(off, found["documents"]),)))
    first = [name for name in dict.fromkeys(rule["metric"] for rule in on) if name in plots]
    rest = [name for name in plots if name not in first[:OPEN_PLOTS]]
    if first:
        blocks.append(Text("Metrics whose rules reject most", heading=True))
        blocks.append(Histograms(tuple(plots[name] for name in first[:OPEN_PLOTS])))
    if rest:
        more = Histograms(tuple(plots[name] for name in rest))
        blocks.append(Fold(f"{len(rest)} {'other' if first else 'measured'} metrics", (more,)))
    lead = "Metrics were measured once, of every document that was read. "
    if found["documents"] < found["of"]:
        lead += (
            f"Shown here are {found['documents']:,} of {found['of']:,} documents: whole groups of "
            "rows, chosen by a hash of their names."
        )
    else:
        lead += "Other thresholds take effect without measuring again."
    if any(metric["histogram"]["kept"] for metric in found["metrics"]):
        lead += " Plots tell documents that stayed to the end from those that left at any step."
    return Chapter("rules", "Rules and thresholds", lead, tuple(blocks))


def _tabulate_rules(rules: list[Any], documents: int) -> Table:
    most = max((rule["rejects"] or 0 for rule in rules), default=0) or 1
    rows = []
    for rule in rules:
        sign = "\N{GREATER-THAN OR EQUAL TO}" if rule["least"] else "\N{LESS-THAN OR EQUAL TO}"
        cuts = [rule["cuts"][share] if rule["cuts"] else None for share in CUT_SHARES]
        rejects = None if rule["rejects"] is None else rule["rejects"] / documents
        only = rule["only"]
        rows.append(
            (
                Cell(rule["key"], note=_name_reason(rule)),
                Cell(
                    _show_threshold(rule["threshold"], sign),
                    note="or by source" if rule.get("varies") else "",
                ),
                Cell("no default", tone="muted")
                if rejects is None
                else Cell(
                    show_percent(rejects),
                    f"{rule['rejects']:,}",
                    share=rule["rejects"] / most,
                    color="bad",
                ),
                Cell("") if only is None else Cell(f"{only:,}", tone="plain" if only else "muted"),
                *(Cell("" if cut is None else show_edge(cut), tone="muted") for cut in cuts),
            )
        )
    head = (
        "Rule",
        "Passes",
        "Rejects alone",
        "Only it",
        *(f"{float(s):.0%} at" for s in CUT_SHARES),
    )
    return Table(
        head=head,
        rows=tuple(rows),
        numeric=frozenset(range(1, len(head))),
        caption="Rejects alone: documents that fail this rule, whatever others say; bars compare "
        "them. Only it: documents that would stay without it. The columns on the right are "
        "thresholds at which the rule would reject at most that share of all documents.",
    )


def _name_reason(rule: Data) -> str:
    """The reason that documents leave with, unless the key says it already."""
    section, _, name = rule["key"].rpartition(".")
    derived = "_".join((*([section] if section else []), name.partition("_")[2]))
    return "" if rule["reason"] == derived else spell(rule["reason"])


def _show_threshold(value: Any, sign: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{sign} {value:,}" if isinstance(value, int) else f"{sign} {show_number(value)}"


def _plot_metric(metric: Data, rules: list[Data], data: Data) -> Histogram:
    found, points = metric["histogram"], metric["quantiles"]
    marks = []
    for rule in sorted(rules, key=lambda rule: rule["threshold"]):
        side = "at least" if rule["least"] else "at most"
        threshold = float(rule["threshold"])
        marks.append(Mark(threshold, f"{side} {show_edge(threshold)}", rule["least"]))
    meaning = metric["meaning"].replace("`", "")
    said = [f"{meaning[:1].upper()}{meaning[1:]}."] if meaning else []
    said.append(
        f"Median {show_edge(points['0.5'])}; 5% below {show_edge(points['0.05'])}, 5% above "
        f"{show_edge(points['0.95'])}."
    )
    if found["zeros"]:
        share = show_percent(found["zeros"] / data["signals"]["documents"])
        said.append(f"The {share} at exactly 0 are not drawn.")
    if found["above"]:
        said.append("The last bar holds all that is larger.")
    edges = tuple(found["edges"])
    whole = all(b - a == 1 for a, b in itertools.pairwise(edges))
    return Histogram(
        spell(metric["name"]),
        edges,
        tuple(found["counts"]),
        None if found["kept"] is None else tuple(found["kept"]),
        " ".join(said),
        tuple(marks),
        above=found["above"],
        whole=whole,
    )


def build_examples(data: Data, targets: Mapping[str, str]) -> Chapter | None:
    """Documents that stayed and that left, by reason."""
    examples = dict(data["examples"])
    if not examples:
        return None
    order = [found["reason"] for step in data["steps"] for found in step["reasons"]]
    ranks = {reason: number for number, reason in enumerate(order)}
    counts = {f["reason"]: f["count"] for step in data["steps"] for f in step["reasons"]}
    blocks: list[Shown] = []
    kept = examples.pop("kept", [])
    if kept:
        target = targets["kept"]
        blocks.append(Cards(target, "Kept", "some that stay", tuple(map(_show_example, kept))))
    paired = DUPLICATES if data["duplicates"].get("pairs") else set()
    for reason in sorted(examples, key=lambda r: (ranks.get(r, len(ranks)), r)):
        if reason in paired or reason in CUTS:
            continue
        note = f"{counts[reason]:,} documents" if reason in counts else ""
        cards = tuple(map(_show_example, examples[reason]))
        blocks.append(Cards(targets[reason], spell(reason).capitalize(), note, cards))
    lead = "The beginnings of the first documents of each kind. Rules make mistakes; reading what "
    lead += "they drop is the way to notice."
    return Chapter("examples", "Examples", lead, tuple(blocks))


def _show_example(row: Data) -> Card:
    return Card(str(row.get("source") or ""), show_origin(row), str(row.get("text") or ""))


def build_rejected(data: Data, targets: Mapping[str, str]) -> Chapter | None:
    """Records that could not be read as documents, with file and offset."""
    if not data["rejected"]:
        return None
    groups: dict[str, list[Card]] = {}
    for row in data["rejected"]:
        place = f"{row['origin']}" if row["origin"] else f"{row['source']}"
        note = "" if row["offset"] is None else f"at offset {row['offset']:,}"
        groups.setdefault(row["reason"], []).append(
            Card(str(row["source"] or ""), place, row["excerpt"], note)
        )
    total = data["headline"]["rejected"]
    blocks = tuple(
        Cards(targets[reason], spell(reason).capitalize(), "", tuple(cards))
        for reason, cards in groups.items()
    )
    lead = (
        f"{total:,} records were no documents. The first of each source and reason; all of them "
        "are in documents/rejected."
    )
    return Chapter("rejected", "Rejected records", lead, blocks)


def build_tokens(data: Data, targets: Mapping[str, str]) -> Chapter | None:
    """The tokenizer, the shards, and the mixture that was wanted and that came of it."""
    shards, domains = data["shards"], data["mixture"].get("domains", {})
    facts = []
    if shards:
        entries = f"{shards['vocab_size']:,} entries"
        for row in data["tokenizers"][:1]:
            facts.append(Fact("Tokenizer", str(row["name"]), entries))
        if shards["bytes_per_token"]:
            held = f"{show_number(shards['bytes_per_token'])} bytes"
            note = "of text in a token" if facts else f"of text in a token, of {entries}"
            facts.append(Fact("Compression", held, note))
        for name, split in shards["splits"].items():
            rows = f"{split['rows']:,} rows of {shards['sequence_length']:,}"
            rows += f", in {split['shards']:,} shard{'' if split['shards'] == 1 else 's'}"
            if shards["padding_share"] and name == "train":
                rows += f"; {show_percent(shards['padding_share'])} padding"
            facts.append(Fact(f"{name.capitalize()} tokens", show_count(split["tokens"]), rows))
    blocks: list[Shown] = [Facts(tuple(facts))] if facts else []
    if domains:
        blocks.append(_tabulate_mixture(domains))
    if not blocks:
        return None
    lead = (
        "What the documents become: rows of tokens, with as much of each domain as was asked for."
    )
    return Chapter("tokens", "Tokens and mixture", lead, tuple(blocks))


def _tabulate_mixture(domains: Mapping[str, Data]) -> Table:
    rows = []
    for name, row in sorted(domains.items(), key=lambda item: (-item[1]["tokens"], item[0])):
        wanted = row.get("wanted_share")
        bound, there = row.get("bound"), row["available_documents"]
        once = row["documents"] <= there
        rows.append(
            (
                Cell(clip(name), note=f"held by {bound}" if bound else ""),
                Cell("as it is" if wanted is None else show_percent(wanted), share=wanted),
                Cell(show_percent(row["share"]), share=row["share"], color="base"),
                Cell(show_count(row["tokens"])),
                Cell(show_number(row["epochs"])),
                Cell(f"{row['documents']:,}", note=f"{'of' if once else 'from'} {there:,}"),
            )
        )
    return Table(
        head=("Domain", "Wanted", "Achieved", "Tokens", "Epochs", "Documents read"),
        rows=tuple(rows),
        numeric=frozenset({1, 2, 3, 4, 5}),
        caption="Epochs: how often each document is read on average; below 1 some are left out.",
    )


def build_stages(data: Data, targets: Mapping[str, str]) -> Chapter | None:
    """Time and throughput, and lineage."""
    stages = data["stages"]
    owners = {stage["content"]: stage["name"] for stage in stages}
    wall = sum(stage["seconds"] for stage in stages)
    worked = sum(stage["worker_seconds"] or 0.0 for stage in stages)
    facts = (
        Fact("Time", show_seconds(wall), "of all stages, one after the other"),
        Fact("Worker time", show_seconds(worked), "summed over tasks, where a stage counts it"),
    )
    speed = Table(
        head=(
            "Stage",
            "Time",
            "Worker time",
            "Documents a second",
            "Text a second",
            "A worker second",
        ),
        rows=tuple(_show_speed(stage) for stage in stages),
        numeric=frozenset({1, 2, 3, 4, 5}),
        caption="Text a second: of the whole machine or cluster. A worker second: text for each "
        "second that a task ran, which is what more cores multiply.",
    )
    lineage = Table(
        head=("Stage", "Content", "Made from", "Files", "Size"),
        rows=tuple(_show_lineage(stage, owners) for stage in stages),
        numeric=frozenset({3, 4}),
        narrow=frozenset({1}),
        caption=f"First {HASH_CHARS} characters of sha256; manifests hold each file's.",
    )
    blocks = (Facts(facts), speed, Text("Lineage", heading=True), lineage)
    return Chapter("stages", "Stages", "What took how long, and what was made from what.", blocks)


def _show_speed(stage: Data) -> tuple[Cell, ...]:
    seconds, worked = stage["seconds"], stage["worker_seconds"]
    size, documents = stage["bytes"], stage["documents"]
    nothing = rate = Cell("", tone="muted")
    if size and seconds:
        rate = Cell(f"{show_size(size / seconds)}/s")
    elif stage["tokens"] and seconds:
        rate = Cell(f"{show_count(stage['tokens'] / seconds)} tokens/s")
    return (
        Cell(STAGES[stage["name"]]),
        Cell(show_seconds(seconds)),
        nothing if worked is None else Cell(show_seconds(worked)),
        Cell(f"{documents / seconds:,.0f}") if documents and seconds else nothing,
        rate,
        Cell(f"{show_size(size / worked)}/s") if size and worked else nothing,
    )


def _show_lineage(stage: Data, owners: Mapping[str, str]) -> tuple[Cell, ...]:
    parents = ", ".join(
        f"{owners.get(content, name)} {content[:HASH_CHARS]}"
        for name, content in sorted(stage["parents"].items())
    )
    return (
        Cell(STAGES[stage["name"]], note=stage["name"]),
        Cell(stage["content"][:HASH_CHARS], mono=True),
        Cell(parents or "settings alone", mono=bool(parents), tone="plain" if parents else "muted"),
        Cell(f"{stage['files']:,}"),
        Cell(show_size(stage["size"])),
    )


def show_size(size: float) -> str:
    """Bytes in decimal units: `950 B`, `12 kB`, `3.4 MB`, `1.2 GB`."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= limit:
            return f"{size / limit:,.1f} {unit}"
    return f"{size / 1e3:,.0f} kB" if size >= 1e3 else f"{size:,.0f} B"


def build_settings(data: Data, targets: Mapping[str, str]) -> Chapter | None:
    """Every setting that a stage was made with, folded."""
    blocks = tuple(
        Fold(f"{STAGES[name]} settings", (Code(_show_settings(settings)),))
        for name, settings in data["settings"].items()
        if settings
    )
    lead = "Resolved: defaults filled in, overrides applied."
    return Chapter("settings", "Settings", lead, blocks) if blocks else None


def _show_settings(settings: Mapping[str, Any]) -> str:
    shown = yaml.safe_dump(dict(settings), sort_keys=True, default_flow_style=None, width=88)
    return str(shown).rstrip()
