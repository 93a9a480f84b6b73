"""Duplicates of a corpus on Ray Data: passes over ranges of keys, never over text.

    alive, priority ─▶ exact: groups of equal text hashes          one task a range of hashes
                 └──▶ near: pairs of documents that share a band   one task a band and range
                            │
                       compare: pairs whose sketches agree         one task a range of documents
                            │
                       keepers                                     one process, verified pairs only

Everything is a function of the index, the settings and the order of documents. How the work is cut
depends on the number of documents, never on the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raylign.config import DedupConfig, UserError
from raylign.data.corpus.parts import run_parts
from raylign.data.corpus.ranges import cut_keys, save
from raylign.data.dedup.groups import MOST_DOCUMENTS, choose, group, pair, split_pairs
from raylign.data.dedup.index import Index, format_id
from raylign.data.dedup.keepers import choose_keepers, count_agreement
from raylign.data.dedup.signatures import estimate_jaccard, needed_agreement
from raylign.tracking import ProgressBoard

KEYS_TOGETHER = 1 << 20
"""Bands of fewer keys are grouped by one task together."""
DOCUMENTS_A_COMPARISON = 1 << 19
SETTLED = np.iinfo(np.int64).max
"""Priority of documents of earlier corpora, which stay whatever comes."""

KEPT, EXACT, NEAR = range(3)

Runner = Callable[..., list[dict[str, Any]]]


@dataclass(frozen=True, slots=True, eq=False)
class Duplicates:
    """What to do with each of N documents."""

    alive: np.ndarray
    """bool [N]: takes part in the comparison."""
    keeper: np.ndarray
    """int64 [N]: the document that stands for it; itself when kept."""
    similarity: np.ndarray
    """float32 [N]: to its keeper: 1 for exact copies and kept ones, estimated Jaccard otherwise."""
    kind: np.ndarray
    """uint8 [N]: `KEPT`, `EXACT` (a copy of its keeper) or `NEAR`."""
    candidates: int
    """Pairs of documents that shared a band."""
    verified: int
    """Pairs among them that are similar enough."""

    @property
    def kept(self) -> np.ndarray:
        """bool [N]: alive, and no duplicate."""
        return self.alive & (self.kind == KEPT)


def find_duplicates(
    stems: Sequence[str],
    alive: np.ndarray,
    priority: np.ndarray,
    settled: int,
    config: DedupConfig,
    directory: Path,
    board: ProgressBoard,
    run: Runner = run_parts,
) -> Duplicates:
    """Compare the documents of the index parts `stems`; `alive` ones only. Ray must be joined.

    `alive` is bool [N], `priority` int64 [N] (higher stays); the first `settled` documents belong
    to earlier corpora and have the priority `SETTLED`. Work files go below `directory`, and are
    found there again by a second attempt. `run` does the parts: on Ray, or as a caller likes.
    """
    if len(alive) >= MOST_DOCUMENTS:
        raise UserError(f"{len(alive)} documents: at most {MOST_DOCUMENTS} in one comparison")
    np.save(directory / "alive.npy", alive)
    np.save(directory / "priority.npy", priority)
    tasks = _Tasks(stems, len(alive), settled, config, directory, board, run)
    first = tasks.find_copies()
    unique = alive & (first == np.arange(len(first)))
    np.save(directory / "unique.npy", unique)
    names = tasks.find_pairs()
    codes, agreed, candidates = tasks.compare_pairs(names)
    keeper, similar = choose_keepers(split_pairs(codes), agreed, priority)
    kind = np.where(keeper == np.arange(len(keeper)), KEPT, NEAR).astype(np.uint8)
    similarity = np.ones(len(keeper), np.float32)
    near = kind == NEAR
    similarity[near] = estimate_jaccard(similar[near], config.bands * config.rows)
    # A copy of a document that went goes for the same one.
    copies = np.flatnonzero(first != np.arange(len(first)))
    origin = first[copies]
    keeper[copies], similarity[copies] = keeper[origin], similarity[origin]
    kind[copies] = np.where(kind[origin] == KEPT, EXACT, NEAR)
    return Duplicates(alive, keeper, similarity, kind, candidates, len(codes))


@dataclass(frozen=True, slots=True, eq=False)
class _Tasks:
    stems: Sequence[str]
    size: int
    settled: int
    config: DedupConfig
    directory: Path
    board: ProgressBoard
    run: Runner

    def _run(self, name: str, rows: Sequence[Any], work: Any, unit: str) -> list[dict[str, Any]]:
        return self.run(name, rows, work, self.directory, self.board, unit, stream=False)

    def find_copies(self) -> np.ndarray:
        """The preferred one of each document's exact copies; int64 [N]."""
        rows = cut_keys(self.size)
        work = partial(find_copies, stems=tuple(self.stems))
        first = np.arange(self.size)
        for report in self._run("exact", rows, work, "range"):
            copies = np.load(self.directory / report["name"])
            first[copies[:, 0]] = copies[:, 1]
        return first

    def find_pairs(self) -> list[str]:
        """Files of candidate pairs."""
        ranges = cut_keys(self.size)
        together = max(1, min(self.config.bands, KEYS_TOGETHER // max(1, self.size)))
        rows: list[dict[str, Any]] = []
        for low in range(0, self.config.bands, together):
            bands = list(range(low, min(low + together, self.config.bands)))
            for part in ranges:
                rows.append(part | {"number": len(rows), "bands": bands})
        work = partial(find_pairs, stems=tuple(self.stems), settled=self.settled)
        reports = self._run("near", rows, work, "band")
        return [report["name"] for report in reports]

    def compare_pairs(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
        """Verified pairs, what they agree, and how many candidates there were."""
        rows = [
            {"number": n, "start": start, "stop": start + DOCUMENTS_A_COMPARISON}
            for n, start in enumerate(range(0, self.size, DOCUMENTS_A_COMPARISON))
        ]
        work = partial(
            compare_pairs,
            stems=tuple(self.stems),
            names=tuple(names),
            needed=needed_agreement(self.config),
        )
        reports = self._run("compare", rows, work, "range")
        found = [np.load(self.directory / report["name"]) for report in reports]
        verified = np.concatenate([np.empty((0, 2), np.uint64), *found])
        candidates = sum(report["candidates"] for report in reports)
        return verified[:, 0], verified[:, 1].astype(np.int64), candidates


def find_copies(row: Mapping[str, Any], directory: Path, stems: Sequence[str]) -> dict[str, Any]:
    """Write (copy, preferred) of the exact copies with text hashes in the row's range."""
    index = Index(stems)
    keys, documents = index.read_keys(
        0, row["start"], row["stop"], np.load(directory / "alive.npy", mmap_mode="r")
    )
    priority = np.load(directory / "priority.npy", mmap_mode="r")[documents]
    members, bounds = group(keys)
    chosen = np.repeat(choose(members, bounds, documents, priority), np.diff(bounds))
    copies = np.stack([documents[members], documents[chosen]], axis=1)
    copies = copies[copies[:, 0] != copies[:, 1]]
    # Half of the hash made them neighbours; the other half decides.
    needed = np.unique(copies)
    checks = index.gather(needed, "check")
    same = (
        checks[np.searchsorted(needed, copies[:, 0])]
        == checks[np.searchsorted(needed, copies[:, 1])]
    )
    return _save(directory, f"exact-{row['number']:06d}.npy", copies[same])


def find_pairs(
    row: Mapping[str, Any], directory: Path, stems: Sequence[str], settled: int
) -> dict[str, Any]:
    """Write the pairs of documents that share a key of one of the row's bands in its range."""
    index = Index(stems)
    alive = np.load(directory / "unique.npy", mmap_mode="r")
    priority = np.load(directory / "priority.npy", mmap_mode="r")
    found = []
    for band in row["bands"]:
        keys, documents = index.read_keys(1 + band, row["start"], row["stop"], alive)
        members, bounds = group(keys)
        found.append(pair(members, bounds, documents, priority[documents], settled))
    codes = found[0] if len(found) == 1 else np.unique(np.concatenate(found))
    return _save(directory, f"pairs-{row['number']:06d}.npy", codes)


def compare_pairs(
    row: Mapping[str, Any],
    directory: Path,
    stems: Sequence[str],
    names: Sequence[str],
    needed: int,
) -> dict[str, Any]:
    """Write (pair, agreement) of the similar pairs whose first document is in the row's range."""
    found = [np.empty(0, np.uint64)]
    bounds = np.array([row["start"] << 32, min(row["stop"] << 32, (1 << 64) - 1)], np.uint64)
    for name in names:
        codes = np.load(directory / name, mmap_mode="r")
        low, high = np.searchsorted(codes, bounds)
        found.append(codes[low:high])
    codes = np.unique(np.concatenate(found))
    pairs = split_pairs(codes)
    documents, places = np.unique(pairs, return_inverse=True)
    sketches = Index(stems).gather(documents, "sketches")
    agreed = count_agreement(sketches, places.reshape(-1, 2))
    similar = agreed >= needed
    verified = np.stack([codes[similar], agreed[similar].astype(np.uint64)], axis=1)
    report = _save(directory, f"similar-{row['number']:06d}.npy", verified)
    return report | {"candidates": len(codes)}


def _save(directory: Path, name: str, array: np.ndarray) -> dict[str, Any]:
    return {"name": save(directory, name, array), "files": [name]}


def save_duplicates(found: Duplicates, index: Index, work: Path) -> None:
    """Write what `Fates` reads: so that a part of the last pass reads its own lines only."""
    gone = np.flatnonzero(found.kind != KEPT)
    standing, places = np.unique(found.keeper[gone], return_inverse=True)
    np.save(work / "gone.npy", gone)
    np.save(work / "stands.npy", index.gather(standing, "id")[places])
    np.save(work / "similarity.npy", found.similarity)
    np.save(work / "kind.npy", found.kind)


@dataclass(frozen=True, slots=True, eq=False)
class Fates:
    """What is known of n documents of one part before the last pass."""

    kind: np.ndarray
    """uint8 [n]: `KEPT`, `EXACT` or `NEAR`."""
    held: np.ndarray
    """bool [n]: kept for evaluation."""
    duplicate_of: Mapping[int, str]
    """Of the duplicates: id of the document that stands for each."""
    similarity: np.ndarray
    """float32 [n]: to that one."""
    cuts: np.ndarray
    """int64 [C, 3]: document, first byte and end of a passage to cut; ascending."""

    @classmethod
    def load(cls, work: Path, start: int, size: int) -> Fates:
        """Those of the documents start..start + size of all; what is not in `work` is none."""
        here = slice(start, start + size)
        kind = _load(work, "kind", np.uint8, here)
        duplicate_of: dict[int, str] = {}
        if (work / "gone.npy").exists():
            gone = np.load(work / "gone.npy", mmap_mode="r")
            low, high = np.searchsorted(gone, [start, start + size])
            stands = np.load(work / "stands.npy", mmap_mode="r")[low:high]
            rows = (gone[low:high] - start).tolist()
            duplicate_of = dict(zip(rows, map(format_id, stands), strict=True))
        cuts = np.empty((0, 3), np.int64)
        if (work / "cuts.npy").exists():
            everywhere = np.load(work / "cuts.npy", mmap_mode="r")
            low, high = np.searchsorted(everywhere[:, 0], [start, start + size])
            cuts = everywhere[low:high] - np.array([start, 0, 0])
        held = _load(work, "held", np.bool_, here)
        return cls(kind, held, duplicate_of, _load(work, "similarity", np.float32, here), cuts)

    def cuts_of(self, document: int) -> np.ndarray:
        """int64 [S, 2]: byte spans to cut from a document of the part."""
        low, high = np.searchsorted(self.cuts[:, 0], [document, document + 1])
        return self.cuts[low:high, 1:]


def _load(work: Path, name: str, dtype: type, here: slice) -> np.ndarray:
    file = work / f"{name}.npy"
    if file.exists():
        return np.load(file, mmap_mode="r")[here]
    return np.zeros(here.stop - here.start, dtype)
