"""Where everything came from: lineage, settings, and how to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from raylign.evaluation.report.document import Block, Cell, Code, Folded, Section, Table, Text
from raylign.evaluation.report.figures import show_seconds
from raylign.evaluation.report.findings import STAGES, TITLES, Findings

HASH_CHARS = 12


def build_lineage(findings: Findings) -> Section | None:
    """Stages, their content hashes, and their parents'."""
    if not findings.stages:
        return None
    # A stage may know its parent by the role it plays, such as `model`.
    owners = {manifest.content: name for name, manifest in findings.stages.items()}
    rows = []
    for stage in STAGES:
        if stage not in findings.stages:
            continue
        manifest, seconds = findings.stages[stage], findings.seconds(stage)
        size = sum(int(f.get("size", 0)) for f in manifest.files.values())
        parents = ", ".join(
            f"{owners.get(content, name)} {content[:HASH_CHARS]}"
            for name, content in sorted(manifest.parents.items())
        )
        rows.append(
            (
                Cell(TITLES[stage], note=stage),
                Cell(manifest.content[:HASH_CHARS], mono=True),
                Cell(
                    parents or "the seed and the settings",
                    mono=bool(parents),
                    tone="plain" if parents else "muted",
                ),
                Cell(_show_bytes(size)),
                Cell("n/a" if seconds is None else show_seconds(seconds)),
            )
        )
    return Section(
        key="lineage",
        title="Lineage",
        lead="Each stage records the content hash of what it read, so this model can be traced to "
        "the last byte of its corpus.",
        blocks=(
            Table(
                head=("Stage", "Content", "Made from", "Size", "Time"),
                rows=tuple(rows),
                numeric=frozenset({3, 4}),
                narrow=frozenset({1}),
                caption=f"First {HASH_CHARS} characters of sha256; the manifests hold each file's.",
            ),
        ),
    )


def build_settings(findings: Findings) -> Section | None:
    """Every setting that a stage was made with, folded."""
    blocks: list[Block] = [
        Folded(
            f"{TITLES[stage]} settings", (Code(_show_settings(findings.stages[stage].settings)),)
        )
        for stage in STAGES
        if stage in findings.stages and findings.stages[stage].settings
    ]
    if not blocks:
        return None
    return Section(
        key="settings",
        title="Settings",
        lead="Resolved: defaults filled in, overrides applied.",
        blocks=tuple(blocks),
    )


def build_reproduction(findings: Findings) -> Section | None:
    """The command, the seed and the machine."""
    blocks: list[Block] = []
    command = findings.journey.get("command")
    if command:
        text = command if isinstance(command, str) else " ".join(map(str, command))
        blocks.append(Code(text))
    seed = find_seed(findings)
    if seed is not None:
        blocks.append(
            Text(
                f"Seed {seed} decides corpus, tokenizer, first weights, order of the data and "
                "sampling. While rollouts and learner overlap, timing decides which policy version "
                "samples what, so the numbers of reinforcement learning vary a little between runs."
            )
        )
    if findings.machine:
        rows = tuple(
            (Cell(str(name).replace("_", " ").capitalize()), Cell(str(value)))
            for name, value in findings.machine.items()
        )
        blocks.append(Table(head=("Machine", ""), rows=rows))
    if not blocks:
        return None
    return Section(
        key="reproduce",
        title="Do it again",
        lead="Everything above was read from the run directory; nothing was filled in by hand.",
        blocks=tuple(blocks),
    )


def find_seed(findings: Findings) -> int | None:
    """The journey's seed, or the first that a stage recorded."""
    settings = [m.settings for m in findings.stages.values()]
    for source in (findings.journey, *settings):
        if isinstance(source.get("seed"), int):
            return int(source["seed"])
    return None


def _show_settings(settings: Mapping[str, Any]) -> str:
    return str(
        yaml.safe_dump(dict(settings), sort_keys=True, default_flow_style=None, width=88)
    ).rstrip()


def _show_bytes(size: int) -> str:
    if size < 1000:
        return f"{size} B"
    if size < 1_000_000:
        return f"{size / 1000:,.0f} kB"
    return f"{size / 1e6:,.1f} MB"
