"""What was measured of the documents, and what each rule would reject of them all by itself.

Read from the `signals` stage alone, columns of numbers: no text is looked at, and memory is that of
`LARGEST` documents. Of more than that a sample of whole row groups is taken, in an order that
depends on their names alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from raylign.config import QualityConfig, SourceConfig
from raylign.data.quality.rules import REASONS, RULES, Rule, read_threshold
from raylign.data.quality.signals import COUNTS, EXTRAS, METRICS
from raylign.data.report.histograms import bin_values, find_cuts
from raylign.data.report.material import Material
from raylign.data.sources.slices import label_sources

LARGEST = 1 << 19
"""Documents whose signals are read."""
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.5)
"""Shares of documents for which thresholds are given."""
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
LANGUAGE_REASON = "language_other"
FLAGS = ("bad_word_count", "blocked_domain", "url_blocked")
"""Whole numbers, or true and false, among the extra signals."""

# Every family with its published thresholds, to say what a rule that is off would do.
_DEFAULTS: dict[str, dict[str, Any]] = {
    name: {}
    for name in (
        *("gopher", "repetition", "c4", "fineweb", "code", "maths"),
        *("language", "blocklist", "education"),
    )
}


@dataclass(frozen=True, slots=True)
class _Group:
    """A row group of signals: which, how many rows, of which slice, and its first document."""

    file: Path
    number: int
    rows: int
    slice: int
    start: int


def gather_metrics(material: Material, largest: int = LARGEST) -> dict[str, Any]:
    """`documents` (looked at), `of`, `metrics` and `rules`; empty without signals."""
    groups = list(_list_groups(material))
    total = sum(group.rows for group in groups)
    chosen = _choose(groups, largest)
    if not total or not chosen:
        return {}
    configs = _list_configs(material)
    kept = material.read_kept()
    tables, stays, judges = [], [], []
    for group in chosen:
        tables.append(_read(group))
        if kept is not None:
            stays.append(np.asarray(kept[group.start : group.start + group.rows]))
        judges.append(configs[group.slice])
    columns = _join(tables)
    rules = _try_rules(tables, columns, judges)
    stayed = np.concatenate(stays) if stays else None
    marks: dict[str, list[float]] = {}
    for rule in rules:
        if rule["on"] and rule["metric"] in columns:
            marks.setdefault(rule["metric"], []).append(float(rule["threshold"]))
    return {
        "documents": sum(group.rows for group in chosen),
        "of": total,
        "metrics": [
            _describe(name, values, stayed, marks.get(name, []))
            for name, values in columns.items()
            if np.isfinite(values).any()
        ],
        "rules": rules,
    }


def _list_groups(material: Material) -> Iterator[_Group]:
    if "signals" not in material.stages:
        return
    start = 0
    for number, report in enumerate(material.reading):
        file = material.root / "signals" / f"part-{number:06d}.parquet"
        if not report["used"] or not file.is_file():
            start += int(report["used"])
            continue
        metadata, at = pq.read_metadata(file), start
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            yield _Group(file, group, rows, number, at)
            at += rows
        start += int(report["used"])


def _choose(groups: Sequence[_Group], largest: int) -> list[_Group]:
    """All of them, or those with the lowest hashes that fit (one at least), in order."""
    if sum(group.rows for group in groups) <= largest:
        return list(groups)
    ranked = sorted(
        groups, key=lambda g: (xxhash.xxh3_64_intdigest(f"{g.slice}/{g.number}".encode()), g.slice)
    )
    chosen: list[_Group] = []
    left = largest
    for group in ranked:
        if group.rows <= left or not chosen:
            chosen.append(group)
            left -= group.rows
    return sorted(chosen, key=lambda g: (g.slice, g.number))


def _read(group: _Group) -> pa.Table:
    with pq.ParquetFile(group.file) as reader:
        names = [name for name in reader.schema_arrow.names if name != "doc_id"]
        return reader.read_row_group(group.number, columns=names)


def _join(tables: Sequence[pa.Table]) -> dict[str, np.ndarray]:
    """Numbers of all tables by name; columns that only some have are left out."""
    names = [
        field.name
        for field in tables[0].schema
        if pa.types.is_primitive(field.type)
        and all(field.name in table.column_names for table in tables)
    ]
    return {
        name: np.concatenate(
            [table[name].to_numpy(zero_copy_only=False).astype(np.float32) for table in tables]
        )
        for name in names
    }


def _list_configs(material: Material) -> list[QualityConfig]:
    """The rules that each slice was judged by."""
    settings = material.prepare("corpus")
    shared = QualityConfig.model_validate(settings.get("quality", {}))
    own = settings.get("source_quality") or []
    sources = material.prepare("documents").get("sources", [])
    if len(own) != len(sources):
        return [shared] * len(material.reading)
    labels = label_sources([SourceConfig.model_validate(source) for source in sources])
    special = {
        label: QualityConfig.model_validate(given)
        for label, given in zip(labels, own, strict=True)
        if given
    }
    return [special.get(report["source"], shared) for report in material.reading]


def _try_rules(
    tables: Sequence[pa.Table], columns: Mapping[str, np.ndarray], judges: Sequence[QualityConfig]
) -> list[dict[str, Any]]:
    """Every rule whose metric was measured: its threshold, and what it rejects alone.

    A threshold that differs between sources is applied as each has it, and shown as most documents
    have it. A rule that is off everywhere is tried at its default; without one it has only `cuts`.
    """
    defaults = QualityConfig.model_validate(_DEFAULTS)
    sizes = [len(table) for table in tables]
    faults = np.zeros(sum(sizes), np.int16)
    masks: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    for rule in RULES:
        if rule.metric not in columns:
            continue
        least = rule.key.rpartition(".")[2].startswith("min_")
        thresholds = [read_threshold(config, rule.key) for config in judges]
        on = any(threshold is not None for threshold in thresholds)
        if not on:
            thresholds = [read_threshold(defaults, rule.key)] * len(judges)
        mask = _reject(columns[rule.metric], thresholds, sizes, least)
        if on:
            faults += mask
            masks[rule.reason] = mask
        shown = _pick_common(thresholds, sizes)
        varies = len({t for t in thresholds if t is not None}) > 1
        rows.append(
            _describe_rule(rule, least, on, shown, mask, columns[rule.metric]) | {"varies": varies}
        )
    languages = _judge_languages(tables, judges)
    if languages is not None:
        mask, allowed = languages
        faults += mask
        masks[LANGUAGE_REASON] = mask
        rows.append(
            {
                "reason": LANGUAGE_REASON,
                "key": REASONS[LANGUAGE_REASON],
                "metric": "language",
                "least": False,
                "on": True,
                "threshold": allowed,
                "rejects": int(mask.sum()),
                "cuts": None,
            }
        )
    for row in rows:
        own = masks.get(row["reason"])
        row["only"] = None if own is None else int((own & (faults == 1)).sum())
    return rows


def _reject(
    values: np.ndarray, thresholds: Sequence[Any], sizes: Sequence[int], least: bool
) -> np.ndarray:
    """bool [n]; thresholds as they were compared: in single precision, None rejects nothing."""
    free = -np.inf if least else np.inf
    limits = np.array([free if t is None else t for t in thresholds], np.float32)
    each = np.repeat(limits, sizes)
    rejected: np.ndarray = values < each if least else values > each
    return rejected


def _pick_common(thresholds: Sequence[Any], sizes: Sequence[int]) -> Any:
    counts: dict[Any, int] = {}
    for threshold, size in zip(thresholds, sizes, strict=True):
        if threshold is not None:
            counts[threshold] = counts.get(threshold, 0) + size
    return max(counts, key=lambda t: (counts[t], t)) if counts else None


def _describe_rule(
    rule: Rule, least: bool, on: bool, threshold: Any, mask: np.ndarray, values: np.ndarray
) -> dict[str, Any]:
    known = values[np.isfinite(values)]
    cuts = find_cuts(known, SHARES, least) if len(known) else []
    return {
        "reason": rule.reason,
        "key": rule.key,
        "metric": rule.metric,
        "least": least,
        "on": on,
        "threshold": threshold,
        "rejects": None if threshold is None else int(mask.sum()),
        "cuts": {f"{share:g}": cut for share, cut in zip(SHARES, cuts, strict=False)} or None,
    }


def _judge_languages(
    tables: Sequence[pa.Table], judges: Sequence[QualityConfig]
) -> tuple[np.ndarray, list[str]] | None:
    """bool [n]: documents in other languages than are allowed, and which are."""
    key = REASONS[LANGUAGE_REASON]
    wanted = [read_threshold(config, key) for config in judges]
    if not any(wanted) or any("language" not in table.column_names for table in tables):
        return None
    masks = []
    for table, allowed in zip(tables, wanted, strict=True):
        found = np.array(table["language"].to_pylist(), object)
        masks.append(~np.isin(found, list(allowed)) if allowed else np.zeros(len(found), bool))
    return np.concatenate(masks), sorted({name for allowed in wanted for name in allowed or ()})


def _describe(
    name: str, values: np.ndarray, kept: np.ndarray | None, marks: Sequence[float]
) -> dict[str, Any]:
    meaning, origin = METRICS.get(name) or EXTRAS.get(name) or ("", "-")
    known = np.isfinite(values)
    values, kept = values[known], None if kept is None else kept[known]
    points = np.quantile(values, QUANTILES)
    return {
        "name": name,
        "meaning": meaning,
        "origin": origin,
        "quantiles": {f"{q:g}": float(f"{v:.6g}") for q, v in zip(QUANTILES, points, strict=True)},
        "histogram": bin_values(values, kept, marks, _is_whole(name)),
    }


def _is_whole(name: str) -> bool:
    return name in COUNTS or name in FLAGS or name.startswith("pii_")
