"""What becomes of documents that hold evaluation items, and which items those are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raylign.config import DecontaminateConfig
from raylign.data.decontamination.index import (
    Evidence,
    Index,
    Matches,
    find_matches,
    remove_lines,
    weigh,
)

EXCERPT_BYTES = 300


@dataclass(frozen=True, slots=True)
class Hit:
    """An item that a document holds."""

    task: str
    item: str
    excerpt: str
    """The longest passage of the document that lies in n-grams of the item, cut to 300 bytes."""
    item_coverage: float
    """Share of the words of the item's text (the one covered best) that the document has."""
    document_coverage: float
    """Share of the document's words that lie in n-grams of this or any other item that it holds."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one document."""

    text: str | None
    """What is left; None when the document goes."""
    removed: tuple[str, ...]
    """The lines that go, where lines do and the document stays."""
    hits: tuple[Hit, ...]
    """Items found in the document as it was, in order of the index; never empty."""


def decontaminate(
    texts: Sequence[str] | pa.Array | pa.ChunkedArray, index: Index, config: DecontaminateConfig
) -> dict[int, Verdict]:
    """What becomes of the documents that hold an item, by position; the others are clean.

    The thresholds are those in `index`. By `line`, every line that an occurrence touches (or comes
    within `config.window` bytes of) goes, until nothing is found any more; a document that loses
    more than half of its characters so goes altogether, as all do by `document`.
    """
    if not len(index.lengths):
        return {}
    matches = find_matches(texts, index)
    found = _list_hits(texts, matches, weigh(matches, index), index)
    if config.granularity == "document":
        return {position: Verdict(None, (), hits) for position, hits in found.items()}
    positions = list(found)
    originals = [_text_at(texts, position) for position in positions]
    cleaned = remove_lines(originals, index, config.window)
    verdicts = {}
    for number, position in enumerate(positions):
        rest = cleaned[number]
        enough = 2 * len(rest.text) >= len(originals[number])
        verdicts[position] = (
            Verdict(rest.text, rest.removed, found[position])
            if enough
            else Verdict(None, (), found[position])
        )
    return verdicts


def _list_hits(
    texts: Sequence[str] | pa.Array | pa.ChunkedArray,
    matches: Matches,
    evidence: Evidence,
    index: Index,
) -> dict[int, tuple[Hit, ...]]:
    """The hits of each affected document."""
    documents = matches.documents[evidence.matches]
    items = index.items[evidence.texts]
    order = np.lexsort((evidence.matches, items, documents))
    documents, items = documents[order], items[order]
    rows, coverage = evidence.matches[order], evidence.coverage[order]
    edges = np.flatnonzero((np.diff(documents) != 0) | (np.diff(items) != 0)) + 1
    shares = _cover(matches, evidence.counted) / np.maximum(matches.sizes, 1)
    hits: dict[int, list[Hit]] = {}
    body, opened = b"", -1
    for first, stop in zip([0, *edges], [*edges, len(rows)], strict=True):
        if first == stop:
            break
        position, group = int(documents[first]), rows[first:stop]
        if position != opened:
            body, opened = _text_at(texts, position).encode(), position
        start, end = _find_longest(matches.starts[group].tolist(), matches.ends[group].tolist())
        task, name = index.names[items[first]]
        hits.setdefault(position, []).append(
            Hit(
                task,
                name,
                body[start:end][:EXCERPT_BYTES].decode(errors="ignore"),
                float(coverage[first:stop].max()),
                float(shares[position]),
            )
        )
    return {position: tuple(found) for position, found in hits.items()}


def _cover(matches: Matches, counted: np.ndarray) -> np.ndarray:
    """Words of each document that lie in the matches that count; int64 [N]."""
    document, length = matches.documents[counted], matches.lengths[counted]
    # As if all documents were one: matches are in order of their first words.
    start = (np.cumsum(matches.sizes) - matches.sizes)[document] + matches.words[counted]
    reached = np.maximum.accumulate(start + length)
    before = np.concatenate([[0], reached[:-1]])
    new = np.maximum(0, start + length - np.maximum(start, before))
    covered = np.zeros(len(matches.sizes), np.int64)
    np.add.at(covered, document, new)
    return covered


def _find_longest(starts: list[int], ends: list[int]) -> tuple[int, int]:
    """The longest stretch of overlapping or touching spans, which are in order of `starts`."""
    best = begin, reached = starts[0], ends[0]
    for start, end in zip(starts, ends, strict=True):
        begin, reached = (start, end) if start > reached else (begin, max(reached, end))
        if reached - begin > best[1] - best[0]:
            best = begin, reached
    return best


def _text_at(texts: Sequence[str] | pa.Array | pa.ChunkedArray, position: int) -> str:
    value = texts[position]
    return value if isinstance(value, str) else value.as_py()
