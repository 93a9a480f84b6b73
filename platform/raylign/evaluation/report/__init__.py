"""The report of a run: one page a stranger can read, its Markdown twin, and the numbers as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raylign.evaluation.report.alignment import build_rollouts, build_timeline
from raylign.evaluation.report.comparison import build_comparison
from raylign.evaluation.report.corpora import build_funnel, build_tokenizer
from raylign.evaluation.report.curves import build_curves
from raylign.evaluation.report.document import Document, Section
from raylign.evaluation.report.findings import STAGES, TITLES, Findings, read_findings
from raylign.evaluation.report.incidents import build_incidents, count_completions
from raylign.evaluation.report.learning import build_learning, build_samples
from raylign.evaluation.report.markdown import render_markdown
from raylign.evaluation.report.overview import (
    build_hero,
    build_journey,
    list_scores,
    mean_mismatch,
    total_seconds,
)
from raylign.evaluation.report.page import render_page
from raylign.evaluation.report.provenance import (
    build_lineage,
    build_reproduction,
    build_settings,
    find_seed,
)
from raylign.evaluation.report.siblings import (
    Sibling,
    build_siblings,
    read_siblings,
    summarize_siblings,
)
from raylign.evaluation.report.timeline import measure_overlap, measure_shares
from raylign.evaluation.report.viewer import build_viewer
from raylign.run import write_json

__all__ = ["build_report"]

# In the order of the page.
_SECTIONS: tuple[Callable[[Findings], Section | None], ...] = (
    build_journey,
    build_funnel,
    build_tokenizer,
    build_learning,
    build_samples,
    build_curves,
    build_timeline,
    build_incidents,
    build_rollouts,
    build_viewer,
    build_comparison,
    build_lineage,
    build_settings,
    build_reproduction,
)


def build_report(
    run_root: Path,
    output: Path,
    machine: Mapping[str, Any] | None = None,
    others: Mapping[str, Path] | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Write `report.html`, `report.md` and `report.json` into `output`; returns the JSON's content.

    Reads the finished stages of `run_root` and its `journey.json`; a stage that is missing is left
    out and named in a note. `machine` is shown as given. `others` are further runs, by the names
    they are shown with, that stand beside this one, called `name`. The same inputs give the same
    bytes. Raises `UserError` for one of `others` that has nothing to show.
    """
    findings = read_findings(run_root, machine)
    siblings = read_siblings(findings, name or run_root.name, others or {})
    document = _compose(findings, siblings)
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.html").write_text(render_page(document), encoding="utf-8")
    (output / "report.md").write_text(render_markdown(document), encoding="utf-8")
    numbers = _summarize(findings, document) | {"runs": summarize_siblings(siblings)}
    write_json(output / "report.json", numbers)
    return numbers


def _compose(findings: Findings, siblings: Sequence[Sibling]) -> Document:
    built = [build(findings) for build in _SECTIONS]
    # Right after this run's own results, whether it has them or not.
    built.insert(_SECTIONS.index(build_comparison) + 1, build_siblings(siblings))
    sections = tuple(section for section in built if section is not None and section.blocks)
    missing = [TITLES[stage].lower() for stage in STAGES if stage not in findings.stages]
    notes = (f"Not part of this run, and left out above: {', '.join(missing)}.",) if missing else ()
    return Document(build_hero(findings), sections, notes)


def _summarize(findings: Findings, document: Document) -> dict[str, Any]:
    together, learning = measure_overlap(findings.events)
    return {
        "title": document.hero.title,
        "scores": [
            {"model": s.model, "value": s.value, "stderr": s.stderr, "gain": s.gain}
            for s in list_scores(findings)
        ],
        "seconds": total_seconds(findings),
        "peak_memory_gb": findings.journey.get("peak_memory_gb"),
        "mean_mismatch": mean_mismatch(findings),
        "overlap": {"seconds": together, "learning_seconds": learning},
        "utilisation": measure_shares(findings.events),
        "books": count_completions(findings),
        "completions": {
            "shown": len(findings.completions.rows),
            "kept": findings.completions.total,
        },
        "stages": {
            name: {
                "seconds": findings.seconds(name),
                "content": manifest.content,
                "parents": manifest.parents,
                "summary": manifest.summary,
            }
            for name, manifest in findings.stages.items()
        },
        "missing": [stage for stage in STAGES if stage not in findings.stages],
        "tasks": findings.results.get("tasks", {}),
        "sections": [section.key for section in document.sections],
        "seed": find_seed(findings),
        "machine": dict(findings.machine),
    }
