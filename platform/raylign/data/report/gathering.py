"""Everything the data report says, as JSON: `gather`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raylign.config import QualityConfig
from raylign.data.quality.rules import REASONS, read_threshold
from raylign.data.report.evidence import (
    gather_duplicates,
    gather_evaluation_items,
    gather_rejected,
)
from raylign.data.report.material import EXPECTED, STAGES, Material
from raylign.data.report.metrics import LARGEST, gather_metrics

GROUPS = ("sources", "domains", "languages")
MOST_ROWS = 500
"""Rows of a group that are listed; the others are added up."""
OTHERS = "(all others)"
MOST_ITEMS = 20
"""Evaluation items of a task that are listed, those in most documents."""


def gather(material: Material, largest: int = LARGEST) -> dict[str, Any]:
    """What `data.json` holds; at most `largest` documents' signals are read.

    All of it is a function of the stages' files, but for `stages`, which has their times.
    """
    funnel = material.funnel
    return {
        "run": material.root.name,
        "missing": [name for name in EXPECTED if name not in material.stages],
        "headline": _sum_up(material),
        "steps": _explain_steps(material),
        "groups": {name: _rank(funnel.get(name, {})) for name in GROUPS},
        "lengths": funnel.get("lengths", {}),
        "signals": gather_metrics(material, largest),
        "duplicates": {**funnel.get("duplicates", {}), **gather_duplicates(material)}
        if funnel
        else {},
        "decontamination": _describe_items(material),
        "removed": funnel.get("removed", {}),
        "examples": funnel.get("examples", {}),
        "rejected": gather_rejected(material),
        "shards": _describe_shards(material),
        "mixture": material.mixture,
        "tokenizers": [_describe_tokenizer(row) for row in material.tokenizers],
        "stages": [_describe_stage(material, name) for name in STAGES if name in material.stages],
        "settings": {name: manifest.settings for name, manifest in material.stages.items()},
    }


def _sum_up(material: Material) -> dict[str, Any]:
    """Counts of records, documents, characters, bytes and tokens; null where unknown.

    Of a slice that a source's limit cuts, characters and bytes are in proportion to its documents.
    """
    sources = material.funnel.get("sources", {})
    used = [report for _, report in material.list_used()]
    documents = sum(int(report["used"]) for report in used)
    rejected = sum(sum(report["rejected"].values()) for report in used)
    splits = material.shards.get("splits", {})
    return {
        "records": documents + rejected,
        "rejected": rejected,
        "documents": documents,
        "unused": sum(int(report["documents"]) for report in material.reading) - documents,
        "chars": _measure(used, "chars"),
        "bytes": _measure(used, "bytes"),
        "kept": _sum(sources, "documents") if sources else None,
        "kept_chars": _sum(sources, "chars") if sources else None,
        "tokens": {name: int(split["tokens"]) for name, split in splits.items()} or None,
    }


def _measure(reports: Sequence[Mapping[str, Any]], name: str) -> int:
    return sum(
        round(int(report[name]) * int(report["used"]) / max(1, int(report["documents"])))
        for report in reports
    )


def _sum(group: Mapping[str, Mapping[str, Any]], name: str) -> int:
    return sum(int(row.get(name, 0)) for row in group.values())


def _explain_steps(material: Material) -> list[dict[str, Any]]:
    """The funnel's steps; each reason with its count and, for rules, the key and its value."""
    settings = material.prepare("corpus")
    config = QualityConfig.model_validate(settings.get("quality", {}))
    steps = []
    for step in material.funnel.get("steps", []):
        reasons = []
        for reason, count in sorted(step["dropped"].items(), key=lambda i: (-i[1], i[0])):
            key = REASONS.get(reason) if step["name"] == "quality" else None
            value = read_threshold(config, key) if key else None
            reasons.append({"reason": reason, "count": count, "key": key, "value": value})
        steps.append({name: step[name] for name in ("name", "in", "out")} | {"reasons": reasons})
    return steps


def _rank(group: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows by what was read of them; beyond `MOST_ROWS` they are one."""
    names = ("read", "documents", "chars")
    rows: list[dict[str, Any]] = [
        {"name": name, **{key: int(found.get(key, 0)) for key in names}}
        for name, found in group.items()
    ]
    rows.sort(key=lambda row: (-row["read"], -row["documents"], row["name"]))
    rest = rows[MOST_ROWS:]
    if rest:
        others = {key: sum(row[key] for row in rest) for key in names}
        rows = [*rows[:MOST_ROWS], {"name": f"{OTHERS[:-1]}: {len(rest):,})", **others}]
    return rows


def _describe_items(material: Material) -> dict[str, Any]:
    found = dict(material.funnel.get("decontamination", {}))
    if not found:
        return {}
    excerpts = gather_evaluation_items(material)
    wanted, occurred = found.pop("items", {}), found.pop("tasks", {})
    tasks = []
    for task in sorted({*wanted, *occurred}):
        items = occurred.get(task, {}).get("items", {})
        most = sorted(items.items(), key=lambda item: (-item[1], item[0]))[:MOST_ITEMS]
        tasks.append(
            {
                "task": task,
                "items": int(wanted.get(task, 0)),
                "occurred": len(items),
                "documents": int(occurred.get(task, {}).get("documents", 0)),
                "most": [{"item": item, "documents": count} for item, count in most],
                "excerpts": excerpts.get(task, []),
            }
        )
    return found | {"tasks": tasks}


def _describe_shards(material: Material) -> dict[str, Any]:
    if not material.shards:
        return {}
    summary = material.stages["shards"].summary
    return {
        "sequence_length": material.shards.get("sequence_length"),
        "vocab_size": material.shards.get("vocab_size"),
        "splits": {
            name: {"rows": split["rows"], "tokens": split["tokens"], "shards": len(split["shards"])}
            for name, split in material.shards.get("splits", {}).items()
        },
        "padding_share": summary.get("padding_share"),
        "bytes_per_token": summary.get("bytes_per_token"),
    }


def _describe_tokenizer(row: Mapping[str, Any]) -> dict[str, Any]:
    names = (
        *("name", "vocab_size", "bytes_per_token", "fertility"),
        *("unknown_rate", "round_trip"),
    )
    return {name: row[name] for name in names if name in row}


def _describe_stage(material: Material, name: str) -> dict[str, Any]:
    """Time, size and lineage. Worker seconds are those that the stage summed over its tasks."""
    manifest = material.stages[name]
    worked = [v for k, v in manifest.summary.items() if k.endswith("_seconds")]
    size = _measure(material.reading, "bytes")
    used = sum(int(report["used"]) for report in material.reading)
    if name in ("tokenizer", "shards", "synthetic", "classifier"):
        size = used = 0
    splits = material.shards.get("splits", {}).values() if name == "shards" else ()
    return {
        "name": name,
        "seconds": manifest.seconds,
        "worker_seconds": round(sum(worked), 3) if worked else None,
        "documents": used or None,
        "bytes": size or None,
        "tokens": sum(int(s["tokens"]) for s in splits) if splits else None,
        "content": manifest.content,
        "parents": manifest.parents,
        "files": len(manifest.files),
        "size": sum(int(file.get("size", 0)) for file in manifest.files.values()),
        "summary": manifest.summary,
    }
