"""Signatures on disk: what a corpus leaves behind so that the next one can be compared with it.

A part of N documents is four `.npy` files, read by memory map: `keys` (uint64 [1 + bands, N], each
row sorted: the text hash, then every band) with `rows` (uint32, same shape: the document of each
key), `sketches` (uint8 [N, K]) and `facts`. Keys being sorted, a range of them is one slice of each
part: groups are found range by range, by many tasks, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raylign.config import UserError
from raylign.data.dedup.signatures import Signatures

FACTS = np.dtype(
    [("id", "V16"), ("check", "<u8"), ("shingles", "<u4"), ("chars", "<u4"), ("day", "<i4")]
)
"""Document id, second half of the text hash, n-grams, characters, and days since 1970 (`NO_DAY`
when unknown)."""
NO_DAY = np.iinfo(np.int32).max
KINDS = ("keys", "rows", "sketches", "facts")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The signatures of some documents, memory-mapped."""

    keys: np.ndarray
    rows: np.ndarray
    sketches: np.ndarray
    facts: np.ndarray

    def __len__(self) -> int:
        return len(self.facts)


def write_part(stem: Path, signatures: Signatures, facts: np.ndarray) -> list[str]:
    """Write the four files of a part; returns their names. They appear whole, one by one."""
    columns = np.concatenate([signatures.hashes[:, :1], signatures.bands], axis=1).T
    rows = np.argsort(columns, axis=1, kind="stable")
    arrays = {
        "keys": np.take_along_axis(columns, rows, axis=1),
        "rows": rows.astype(np.uint32),
        "sketches": signatures.sketches,
        "facts": facts,
    }
    names = []
    for kind, array in arrays.items():
        file = _file(stem, kind)
        temporary = file.with_name(f".{file.name}")
        with temporary.open("wb") as stream:
            np.save(stream, np.ascontiguousarray(array))
        temporary.replace(file)
        names.append(file.name)
    return names


def make_facts(
    ids: Sequence[str], signatures: Signatures, chars: np.ndarray, days: np.ndarray
) -> np.ndarray:
    """`FACTS` of documents with hexadecimal `ids` (others are hashed by the caller)."""
    facts = np.empty(len(ids), FACTS)
    facts["id"] = np.frombuffer(bytes.fromhex("".join(ids)), "V16")
    facts["check"] = signatures.hashes[:, 1]
    facts["shingles"] = signatures.shingles
    facts["chars"] = np.minimum(chars, np.iinfo(np.uint32).max)
    facts["day"] = days
    return facts


def open_part(stem: Path) -> Part:
    """A part, without reading it. Raises `UserError` when a file is missing or damaged."""
    arrays = {}
    for kind in KINDS:
        file = _file(stem, kind)
        try:
            arrays[kind] = np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{file} cannot be read ({reason}); make the signatures again"
            ) from None
    return Part(**arrays)


def _file(stem: Path, kind: str) -> Path:
    return stem.with_name(f"{stem.name}.{kind}.npy")


class Index:
    """Parts one after the other, as one sequence of documents."""

    def __init__(self, stems: Iterable[Path | str]) -> None:
        self.parts = [open_part(Path(stem)) for stem in stems]
        self.offsets = np.concatenate([[0], np.cumsum([len(part) for part in self.parts])]).astype(
            np.int64
        )

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def read_keys(
        self, column: int, start: int, stop: int, alive: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keys (uint64) of a column in [start, stop) and their documents (int64), of those alive.

        `stop` may be 2**64. For a band, documents without n-grams are left out.
        """
        keys, documents = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for part, offset in zip(self.parts, self.offsets, strict=False):
            row = part.keys[column]
            low = np.searchsorted(row, np.uint64(start))
            high = len(row) if stop >= 1 << 64 else np.searchsorted(row, np.uint64(stop))
            here = part.rows[column][low:high].astype(np.int64)
            wanted = alive[offset + here]
            if column:
                wanted &= part.facts["shingles"][here] > 0
            keys.append(row[low:high][wanted])
            documents.append(offset + here[wanted])
        return np.concatenate(keys), np.concatenate(documents)

    def gather(self, documents: np.ndarray, field: str) -> np.ndarray:
        """`sketches`, or a field of `FACTS`, of the given documents (int64, ascending)."""
        bounds = np.searchsorted(documents, self.offsets)
        pieces = []
        for number, part in enumerate(self.parts):
            rows = documents[bounds[number] : bounds[number + 1]] - self.offsets[number]
            if len(rows):
                source = part.sketches if field == "sketches" else part.facts[field]
                pieces.append(source[rows])
        if not pieces:
            return self.parts[0].sketches[:0] if field == "sketches" else np.empty(0, FACTS[field])
        return np.concatenate(pieces)

    def facts(self, field: str) -> np.ndarray:
        """A field of all documents, in order."""
        return np.concatenate([part.facts[field] for part in self.parts])


def format_id(value: np.void) -> str:
    """The document id as it is written in tables."""
    return value.tobytes().hex()
