"""What a run directory holds of its data: manifests, small files and the places of large ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raylign.config import UserError
from raylign.run import Manifest, read_stage

STAGES = {
    "synthetic": "Synthetic documents",
    "documents": "Documents",
    "classifier": "Quality classifier",
    "signals": "Signals",
    "signatures": "Signatures",
    "corpus": "Corpus",
    "tokenizer": "Tokenizer",
    "shards": "Shards",
}
"""Stages that a data report reads, and their titles; only `documents` has to be there."""
EXPECTED = ("signals", "signatures", "corpus", "tokenizer", "shards")
"""Stages whose absence is worth a note."""


@dataclass(frozen=True, slots=True)
class Material:
    """A run's data stages; what is missing is empty."""

    root: Path
    stages: Mapping[str, Manifest]
    reading: tuple[Mapping[str, Any], ...]
    """A report for each slice of the sources."""
    funnel: Mapping[str, Any]
    tokenizers: tuple[Mapping[str, Any], ...]
    shards: Mapping[str, Any]
    mixture: Mapping[str, Any]

    def list_used(self) -> list[tuple[int, Mapping[str, Any]]]:
        """Slices that the run looks at, with their numbers; not those beyond a source's limit."""
        return [
            (number, report)
            for number, report in enumerate(self.reading)
            if report["used"] or not report["documents"]
        ]

    def list_parts(self, *folders: str) -> list[Path]:
        """Parquet files of a folder, in order."""
        return sorted(self.root.joinpath(*folders).glob("*.parquet"))

    def prepare(self, stage: str) -> Mapping[str, Any]:
        """The section `prepare` of the settings that `stage` was made with."""
        manifest = self.stages.get(stage)
        found = manifest.settings.get("prepare", {}) if manifest else {}
        return found if isinstance(found, Mapping) else {}

    def read_kept(self) -> np.ndarray | None:
        """bool [documents in use]: what stayed, in the order of the slices."""
        file = self.root / "corpus" / "kept.npy"
        if "corpus" not in self.stages or not file.is_file():
            return None
        kept: np.ndarray = np.load(file, mmap_mode="r")
        used = sum(int(report["used"]) for report in self.reading)
        return kept if len(kept) == used else None


def read_material(root: Path) -> Material:
    """Read the finished stages below `root`.

    Raises `UserError` when there is no `documents` stage, or a file of one is damaged.
    """
    stages = {name: s.manifest for name in STAGES if (s := read_stage(root / name)) is not None}
    if "documents" not in stages:
        raise UserError(
            f"run {root} has no finished 'documents' stage; run `python -m jobs.prepare` first"
        )

    def read(stage: str, name: str, default: Any) -> Any:
        return _read_json(root / stage / name, default) if stage in stages else default

    return Material(
        root=root,
        stages=stages,
        reading=tuple(read("documents", "reading.json", [])),
        funnel=read("corpus", "funnel.json", {}),
        tokenizers=tuple(read("tokenizer", "comparison.json", [])),
        shards=read("shards", "index.json", {}),
        mixture=read("shards", "mixture.json", {}),
    )


def _read_json(file: Path, default: Any) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise UserError(
            f"{file} is damaged ({error}); delete {file.parent} and rerun jobs.prepare"
        ) from None
