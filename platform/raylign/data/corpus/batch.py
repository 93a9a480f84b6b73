"""Some documents on the way through the last pass, and what has become of each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylign.config import DecontaminateConfig, PiiConfig
from raylign.data.corpus.duplicates import EXACT, NEAR, Fates
from raylign.data.corpus.funnel import EXAMPLE_CHARS, Tally, add
from raylign.data.decontamination.index import Index, overlapping
from raylign.data.decontamination.removal import decontaminate
from raylign.data.documents import DOCUMENTS
from raylign.data.quality.pii import scrub

_SHOWN = ("doc_id", "source", "origin", "url")
# A document of which less than this is left after its repeated passages were cut goes as a whole.
_LEAST_LEFT = 0.5


class Batch:
    """A table of documents, and for each the step at which it went ("" while it stays)."""

    def __init__(self, table: pa.Table, signals: pa.Table | None) -> None:
        self._table, self._signals = table, signals
        size = len(table)
        self._steps = np.full(size, "", object)
        self._reasons: list[list[str]] = [[] for _ in range(size)]
        self._duplicate_of: list[str | None] = [None] * size
        self._similarity = np.full(size, np.nan, np.float32)
        self._details: list[str | None] = [None] * size
        self._texts: dict[int, str] = {}
        self._removed: Counter[str] = Counter()
        self._hits: dict[str, dict[str, Any]] = {}
        self._shown: list[tuple[str, int, str]] = []

    @property
    def stays(self) -> np.ndarray:
        """bool [n]"""
        return self._steps == ""

    def judge(self, reasons: Sequence[list[str]]) -> None:
        """Take out what the quality rules reject."""
        for position, found in enumerate(reasons):
            if found:
                self._drop(position, "quality", found)

    def follow(self, fates: Fates, at: int) -> None:
        """Take out duplicates and held-out documents; the first row is `at` in its part."""
        here = slice(at, at + len(self._table))
        for kind, step in ((EXACT, "exact_duplicates"), (NEAR, "near_duplicates")):
            for position in np.flatnonzero(fates.kind[here] == kind).tolist():
                self._drop(position, step, [step.removesuffix("s")])
                self._duplicate_of[position] = fates.duplicate_of[at + position]
                self._similarity[position] = fates.similarity[at + position]
        for position in np.flatnonzero(fates.held[here]).tolist():
            self._drop(position, "english_held_out", ["english_held_out"])

    def texts(self, step: str) -> list[str]:
        """Texts of the documents that went at `step`."""
        return self._table["text"].filter(pa.array(self._steps == step)).to_pylist()

    def cut(self, fates: Fates, at: int) -> None:
        """Take out the passages that occur elsewhere."""
        affected = np.unique(fates.cuts[:, 0]) - at
        affected = affected[(affected >= 0) & (affected < len(self._table))]
        for position in affected[self.stays[affected]].tolist():
            spans = fates.cuts_of(at + position)
            text = self._table["text"][position].as_py()
            shorter, pieces = _cut_spans(text, spans)
            if len(shorter) < _LEAST_LEFT * len(text):
                self._drop(position, "repeated_text", ["repeated_text"])
                continue
            self._texts[position] = shorter
            self._removed["repeated_passages"] += len(pieces)
            self._removed["documents_with_repeated_passages"] += 1
            self._shown.append(("repeated_passage", position, pieces[0]))

    def decontaminate(self, index: Index, config: DecontaminateConfig) -> None:
        """Take out evaluation items, or the documents that hold them."""
        positions = np.flatnonzero(self.stays)
        found = decontaminate(self._current(positions), index, config)
        for place, verdict in sorted(found.items()):
            position = int(positions[place])
            hits = [{s: getattr(hit, s) for s in type(hit).__slots__} for hit in verdict.hits]
            for task in {hit["task"] for hit in hits}:
                items = {hit["item"] for hit in hits if hit["task"] == task}
                counts = {"documents": 1, "items": dict.fromkeys(sorted(items), 1)}
                add(self._hits.setdefault(task, {}), counts)
            self._details[position] = json.dumps({"evaluation_items": hits}, ensure_ascii=False)
            if verdict.text is None:
                reasons = sorted({hit["task"] for hit in hits}) or ["held_out"]
                self._drop(position, "decontaminate", reasons)
            else:
                self._texts[position] = verdict.text
                self._removed["held_out_lines"] += len(verdict.removed)
                self._removed["documents_with_held_out_lines"] += 1
                if verdict.removed:
                    self._shown.append(("held_out_line", position, verdict.removed[0]))

    def scrub(self, config: PiiConfig) -> None:
        """Replace personal data in what stays."""
        if config == PiiConfig():
            return
        positions = np.flatnonzero(self.stays)
        for position, text in zip(
            positions.tolist(), self._current(positions).to_pylist(), strict=True
        ):
            clean, counts = scrub(text, config)
            if clean != text:
                self._texts[position] = clean
                self._removed.update({f"pii_{kind}": n for kind, n in counts.items()})

    def split(self, excluded: pa.Schema) -> tuple[pa.Table, pa.Table]:
        """(kept, excluded) documents; the second with `excluded`'s columns."""
        stays = self.stays
        kept = self._table.filter(pa.array(stays))
        if self._texts:
            texts = self._current(np.flatnonzero(stays))
            kept = kept.set_column(kept.schema.get_field_index("text"), "text", texts)
        gone = np.flatnonzero(~stays & (self._steps != "english_held_out"))
        columns = {
            "stage": [self._steps[p] for p in gone],
            "reasons": [self._reasons[p] for p in gone],
            "duplicate_of": [self._duplicate_of[p] for p in gone],
            "similarity": [
                None if np.isnan(self._similarity[p]) else self._similarity[p] for p in gone
            ],
            "details": [self._details[p] for p in gone],
        }
        table = self._table.take(pa.array(gone))
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, excluded.field(name).type))
        return kept.cast(DOCUMENTS), table.cast(excluded)

    def count(self, index: Index, tally: Tally) -> None:
        """Add to `tally` what became of the batch. Call last."""
        dropped: Counter[tuple[str, str]] = Counter()
        for position in np.flatnonzero(~self.stays).tolist():
            for reason in self._reasons[position]:
                dropped[self._steps[position], reason] += 1
                if tally.wants(reason):
                    tally.show(reason, self._describe(position, self._table["text"]))
        tally.drop(Counter(self._steps[~self.stays].tolist()), dropped)
        for reason, position, text in self._shown:
            tally.show(reason, self._describe(position) | {"text": text[:EXAMPLE_CHARS]})
        self._count_kept(tally)
        add(tally.contamination, self._hits)
        add(tally.removed, self._removed)
        texts = self._current(np.flatnonzero(self.stays))
        tally.overlap_after += len(overlapping(texts, index))

    def _count_kept(self, tally: Tally) -> None:
        chars = pc.utf8_length(self._table["text"]).to_numpy().astype(np.int64).copy()
        for position, text in self._texts.items():
            chars[position] = len(text)
        bins = np.frexp(np.maximum(chars, 1))[1] - 1
        for step in sorted(set(self._steps)):
            powers = Counter(bins[self._steps == step].tolist())
            add(tally.lengths, {step: {f"{power:02d}": n for power, n in sorted(powers.items())}})
        stays = np.flatnonzero(self.stays)
        add(tally.left, {"": len(stays)} if len(stays) else {})
        groups = {"sources": self._table["source"], "domains": self._table["domain"]}
        if self._signals is not None and "language" in self._signals.schema.names:
            groups["languages"] = self._signals["language"]
        for name, column in groups.items():
            labels, places = _encode(column)
            kept_places = places[stays]
            sums = getattr(tally, name)
            documents = np.bincount(kept_places, minlength=len(labels))
            letters = np.bincount(kept_places, chars[stays], len(labels)).astype(np.int64)
            everything = np.bincount(places, minlength=len(labels))
            for place in np.argsort(labels).tolist():
                counts = {"documents": int(documents[place]), "chars": int(letters[place])}
                read = {} if name == "sources" else {"read": int(everything[place])}
                add(sums, {str(labels[place]): counts | read})
        if tally.wants("kept"):
            for position in stays[:1].tolist():
                tally.show("kept", self._describe(position, self._current(stays[:1])))

    def _describe(self, position: int, texts: pa.ChunkedArray | None = None) -> dict[str, Any]:
        """What an example shows; the text is at `position` of `texts`, or first when it has one."""
        shown = {name: self._table[name][position].as_py() for name in _SHOWN}
        if texts is not None:
            shown["text"] = texts[position if len(texts) > 1 else 0].as_py()[:EXAMPLE_CHARS]
        if self._duplicate_of[position] is not None:
            shown["duplicate_of"] = self._duplicate_of[position]
            shown["similarity"] = round(float(self._similarity[position]), 3)
        return shown

    def _current(self, positions: np.ndarray) -> pa.ChunkedArray:
        """Texts as they are by now."""
        texts = self._table["text"].take(pa.array(positions))
        changed = [i for i, position in enumerate(positions.tolist()) if position in self._texts]
        if not changed:
            return texts
        values = texts.to_pylist()
        for i in changed:
            values[i] = self._texts[int(positions[i])]
        return pa.chunked_array([pa.array(values, pa.large_string())])

    def _drop(self, position: int, step: str, reasons: list[str]) -> None:
        if not self._steps[position]:
            self._steps[position], self._reasons[position] = step, reasons
            self._texts.pop(position, None)


def _encode(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The different labels of a column (str), and which of them each row has (int64)."""
    encoded = pc.fill_null(column, "None").combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    return np.array(encoded.dictionary.to_pylist()), encoded.indices.to_numpy().astype(np.int64)


def _cut_spans(text: str, spans: np.ndarray) -> tuple[str, list[str]]:
    """`text` without the byte spans (int64 [S, 2], ascending), and what was cut."""
    raw = text.encode()
    left, pieces, at = [], [], 0
    for start, stop in spans.tolist():
        left.append(raw[at:start])
        pieces.append(raw[start:stop].decode(errors="replace"))
        at = stop
    left.append(raw[at:])
    return b"".join(left).decode().strip("\n"), pieces
