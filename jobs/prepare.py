"""Corpus and shards: `python -m jobs.prepare recipe.yaml [prepare.key=value ...] [--check]`.

Reads the sources (`documents`), measures and signs every document (`signals`, `signatures`),
decides what stays (`corpus`), trains a `tokenizer` unless the recipe names one, lays the documents
out as packed token rows (`shards`), and shows all of it (`data_report`). An interrupted stage
continues after its last finished part. With `--check` the sources are looked at, nothing is run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.data_report import build_data_report
from jobs.entry import main, perform, section
from jobs.shards import build_shards
from jobs.tokenizer import build_tokenizer
from raylign.config import PrepareConfig, Recipe, UserError
from raylign.data.corpus.features import measure_documents, sign_documents
from raylign.data.corpus.ingest import read_documents
from raylign.data.corpus.pipeline import Inputs, list_files
from raylign.data.corpus.pipeline import build_corpus as write_corpus
from raylign.data.decontamination.evaluation_sets import load_items
from raylign.data.documents import DOCUMENTS
from raylign.data.inspection import inspect, render
from raylign.data.quality.rules import judge
from raylign.data.quality.signals import measure
from raylign.data.sources.fingerprints import identify_sources
from raylign.data.sources.slices import label_sources, plan_slices
from raylign.run import Draft, Run, Stage, content_hash, read_stage, write_json
from raylign.runtime import derive_seed
from raylign.tracking import ProgressBoard

READING = "reading.json"
"""Reports of the first pass, in the `documents` stage."""
SIGNATURE_KEYS = {"ngram", "bands", "rows"}
Reading = Sequence[Mapping[str, Any]]


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """All stages up to the shards."""
    config = section(recipe, "prepare", PrepareConfig)
    if config.tokenizer is not None and not config.tokenizer.is_dir():
        raise UserError(f"prepare.tokenizer={config.tokenizer}: no such directory")
    build_corpus(recipe, run, board)
    if config.tokenizer is None:
        tokenizer = build_tokenizer(recipe, run, board)
        build_shards(recipe, run, board, tokenizer.path, tokenizer.manifest.content)
    else:
        path = config.tokenizer.absolute()
        build_shards(recipe, run, board, path, content_hash(path))
    build_data_report(recipe, run, board)


def check(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """Look at the sources; nothing is written."""
    config = section(recipe, "prepare", PrepareConfig)
    reports = inspect(config, recipe.seed)
    sys.stdout.write(render(reports) + "\n")
    if any(report.error for report in reports):
        raise UserError("a source cannot be used as it is; see above")


def build_corpus(recipe: Recipe, run: Run, board: ProgressBoard) -> Stage:
    """The `corpus` stage, and those that it is made from."""
    config = section(recipe, "prepare", PrepareConfig)
    _check_rules(config)
    earlier = [_find_earlier(path, config) for path in config.dedup.against]
    documents = build_documents(recipe, run, board)
    reading = json.loads((documents.path / READING).read_text(encoding="utf-8"))
    signals = build_signals(config, run, board, documents, reading)
    signatures = build_signatures(config, run, board, documents, reading)
    parents = {
        stage.manifest.stage: stage.manifest.content for stage in (documents, signals, signatures)
    }
    for path, (_, corpus) in zip(config.dedup.against, earlier, strict=True):
        parents[str(path)] = corpus.manifest.content
    for wanted in config.decontaminate.against:
        parents[str(wanted.path)] = content_hash(wanted.path) if wanted.path.exists() else ""
    settings = {"prepare": _select(config), "seed": recipe.seed}
    inputs = _gather(config, documents, signals, signatures, reading, earlier)

    def build(draft: Draft) -> None:
        seed = derive_seed(recipe.seed, "corpus")
        summary = write_corpus(inputs, config, seed, draft.path, board)
        draft.summary.update(summary)
        board.say(
            f"  {summary['documents']:,} of {summary['read']:,} documents kept, "
            f"{summary['chars'] / 1e6:.1f} M characters"
        )

    return perform(run, "corpus", settings, parents, board, build, resume=True)


def build_documents(recipe: Recipe, run: Run, board: ProgressBoard) -> Stage:
    """The `documents` stage: everything that the sources hold, as clean text."""
    config = section(recipe, "prepare", PrepareConfig)
    slices = plan_slices(config.sources, config.textbook)
    sources = [source.model_dump(mode="json", exclude={"quality"}) for source in config.sources]
    settings: dict[str, Any] = {
        "prepare": {"sources": sources, "max_damaged_share": config.max_damaged_share},
        "seed": recipe.seed,
    }
    if any(source.kind == "textbook" for source in config.sources):
        settings["prepare"]["textbook"] = config.textbook.model_dump(mode="json")
    if any(source.kind in ("pydoc", "docstrings") for source in config.sources):
        settings["python"] = sys.version.split()[0]  # its documentation is part of the corpus

    def build(draft: Draft) -> None:
        seed = derive_seed(recipe.seed, "corpus")
        reports = read_documents(slices, config, seed, draft.path, board)
        told = ("source", "documents", "used", "chars", "bytes", "rejected")
        write_json(draft.path / READING, [{name: r[name] for name in told} for r in reports])
        _finish(draft, reports, "read")
        draft.summary["documents"] = sum(report["used"] for report in reports)
        draft.summary["rejected"] = sum(sum(r["rejected"].values()) for r in reports)

    return perform(
        run, "documents", settings, identify_sources(config.sources), board, build, resume=True
    )


def build_signals(
    config: PrepareConfig, run: Run, board: ProgressBoard, documents: Stage, reading: Reading
) -> Stage:
    """The `signals` stage: what is measured of every document."""
    parents = {"documents": documents.manifest.content}
    if config.signals.classifier is not None:
        parents["classifier"] = content_hash(config.signals.classifier)
    for name in ("bad_words", "blocked_urls"):
        for place, file in enumerate(getattr(config.signals, name)):
            parents[f"{name}.{place}"] = content_hash(file)

    def build(draft: Draft) -> None:
        files = list_files(documents.path, reading)
        _finish(draft, measure_documents(files, config.signals, draft.path, board), "measure")

    settings = {"prepare": {"signals": config.signals.model_dump(mode="json")}}
    return perform(run, "signals", settings, parents, board, build, resume=True)


def build_signatures(
    config: PrepareConfig, run: Run, board: ProgressBoard, documents: Stage, reading: Reading
) -> Stage:
    """The `signatures` stage: the index that duplicates are found with, today and tomorrow."""

    def build(draft: Draft) -> None:
        files = list_files(documents.path, reading)
        _finish(draft, sign_documents(files, config.dedup, draft.path, board), "sign")

    settings = {"prepare": {"dedup": _signature_settings(config)}}
    parents = {"documents": documents.manifest.content}
    return perform(run, "signatures", settings, parents, board, build, resume=True)


def _finish(draft: Draft, reports: Reading, name: str) -> None:
    """Hashes of the files from where they were written; time and size for the data report."""
    for report in reports:
        draft.hashes.update({f: found["sha256"] for f, found in report["files"].items()})
    draft.summary[f"{name}_seconds"] = round(sum(report["seconds"] for report in reports), 3)


def _check_rules(config: PrepareConfig) -> None:
    """Raise `UserError` now, not after hours, for what is missing: a list, the signal of a rule,
    an evaluation set."""
    load_items(config.decontaminate)
    if config.dedup.keep == "best" and config.signals.classifier is None:
        raise UserError(
            "prepare.dedup.keep=best: needs the scores of a classifier; give "
            "prepare.signals.classifier, or another rule"
        )
    if config.signals.classifier is not None and not config.signals.classifier.is_dir():
        raise UserError(
            f"prepare.signals.classifier={config.signals.classifier}: no such directory; "
            "`python -m jobs.classifier` makes one"
        )
    nothing = pa.table({name: pa.array([], DOCUMENTS.field(name).type) for name in ("text", "url")})
    signals = measure(nothing, config.signals)
    for rules in (config.quality, *(source.quality for source in config.sources)):
        if rules is not None:
            judge(signals, rules)


def _select(config: PrepareConfig) -> dict[str, Any]:
    """What the `corpus` stage depends on besides its parents."""
    chosen = config.model_dump(
        mode="json",
        include={"quality", "pii", "dedup", "decontaminate", "english_held_out_share"},
    )
    chosen["source_quality"] = [
        source.quality.model_dump(mode="json") if source.quality else None
        for source in config.sources
    ]
    if any(source.kind == "textbook" for source in config.sources):
        chosen["textbook"] = config.textbook.model_dump(mode="json")
    return chosen


def _signature_settings(config: PrepareConfig) -> dict[str, Any]:
    return config.dedup.model_dump(mode="json", include=SIGNATURE_KEYS)


def _find_earlier(path: Path, config: PrepareConfig) -> tuple[Stage, Stage]:
    """(signatures, corpus) of a finished run; raises `UserError` when they cannot be compared."""
    stages = [read_stage(path / name) for name in ("signatures", "corpus")]
    if None in stages:
        raise UserError(
            f"prepare.dedup.against={path}: holds no finished signatures and corpus; "
            "name the directory of a run that `python -m jobs.prepare` finished"
        )
    signatures, corpus = stages
    assert signatures is not None and corpus is not None
    theirs = signatures.manifest.settings["prepare"]["dedup"]
    for key, mine in _signature_settings(config).items():
        if theirs[key] != mine:
            raise UserError(
                f"prepare.dedup.against={path}: was signed with {key}={theirs[key]}, not {mine}; "
                f"set prepare.dedup.{key}={theirs[key]}"
            )
    return signatures, corpus


def _gather(
    config: PrepareConfig,
    documents: Stage,
    signals: Stage,
    signatures: Stage,
    reading: Reading,
    earlier: Sequence[tuple[Stage, Stage]],
) -> Inputs:
    """What the corpus is made from, as rows of plain values."""
    rules = {
        label: source.quality.model_dump(mode="json") if source.quality else None
        for label, source in zip(label_sources(config.sources), config.sources, strict=True)
    }
    kinds = dict(zip(label_sources(config.sources), (s.kind for s in config.sources), strict=True))
    names = [f"part-{number:06d}" for number in range(len(reading))]
    files = list_files(
        documents.path,
        reading,
        signals=[str(signals.path / f"{name}.parquet") for name in names],
        kind=[kinds[report["source"]] for report in reading],
        quality=[rules[report["source"]] for report in reading],
    )
    stems, kept = [], []
    for signed, corpus in earlier:
        stems += sorted(
            {str(f).removesuffix(".facts.npy") for f in signed.path.glob("*.facts.npy")}
        )
        kept.append(np.load(corpus.path / "kept.npy"))
    return Inputs(
        files=files,
        stems=tuple(str(signatures.path / f"part-{row['number']:06d}") for row in files),
        reading=tuple(reading),
        earlier=tuple(stems),
        earlier_kept=np.concatenate(kept) if kept else None,
    )


if __name__ == "__main__":
    main("prepare", run, {"--check": check})
