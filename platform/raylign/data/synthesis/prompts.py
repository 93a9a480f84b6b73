"""Which prompts are asked: combinations of style, topic, audience and excerpt, none of them twice.

The prompts of a style are drawn by a keyed permutation of all its combinations, which is never
written down: a draw of any size is reproducible, and a longer one begins with the shorter one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from raylign.config import UserError
from raylign.data.documents import list_document_files, read_batches, shuffle_key
from raylign.data.packing import rows_for_step
from raylign.data.quality.judging import excerpt
from raylign.data.synthesis.styles import Style
from raylign.runtime import derive_seed


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Part of a document that a prompt shows."""

    doc_id: str
    text: str


@dataclass(frozen=True, slots=True)
class Material:
    """What prompts are made of."""

    topics: tuple[str, ...]
    audiences: tuple[str, ...]
    seeds: tuple[Excerpt, ...]

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the fields that there are values for."""
        sizes = self.sizes()
        return tuple(name for name, size in sizes.items() if size)

    def sizes(self) -> dict[str, int]:
        """Number of values of each field."""
        return {
            "topic": len(self.topics),
            "audience": len(self.audiences),
            "seed": len(self.seeds),
        }


@dataclass(frozen=True, slots=True)
class DrawnPrompt:
    """One prompt, and what it was made from."""

    text: str
    style: Style
    topic: str | None
    audience: str | None
    seed_document: str | None
    """`doc_id` of the document whose excerpt is shown."""

    @property
    def hash(self) -> str:
        """128 bits of the text, in hexadecimal."""
        return xxhash.xxh3_128_hexdigest(self.text.encode())


def read_lines_of(given: tuple[str, ...] | Path, key: str) -> tuple[str, ...]:
    """A list of the recipe, or the lines of a file: stripped, blank ones left out, each once.

    Raises `UserError` naming `key` for a file that cannot be read or holds nothing.
    """
    if isinstance(given, Path):
        try:
            lines = given.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise UserError(f"{key}={given} cannot be read ({reason}); correct the path") from None
    else:
        lines = list(given)
    chosen = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if isinstance(given, Path) and not chosen:
        raise UserError(f"{key}={given} holds no lines; write one {key.split('.')[-1]} a line")
    return chosen


def draw_excerpts(
    directory: Path, documents: int, max_chars: int, seed: int
) -> tuple[Excerpt, ...]:
    """Excerpts of at most `documents` documents, chosen and ordered by hash of id and seed.

    Each is at most `max_chars` long and begins at a line. Memory is that of the chosen ones.
    Raises `UserError` when `directory` holds no documents.
    """
    chosen: list[tuple[int, str, str]] = []
    for file in list_document_files(directory, "synthesise.seeds"):
        for table in read_batches(file, ["doc_id", "text"]):
            ids, texts = table["doc_id"].to_pylist(), table["text"].to_pylist()
            for doc_id, text in zip(ids, texts, strict=True):
                if text and text.strip():
                    chosen.append((shuffle_key(doc_id, seed), doc_id, text))
            chosen = sorted(chosen)[:documents]
    if not chosen:
        raise UserError(f"synthesise.seeds={directory}: holds no documents with text")
    return tuple(
        Excerpt(doc_id, _cut(text, max_chars, derive_seed(seed, doc_id)))
        for _, doc_id, text in chosen
    )


def _cut(text: str, max_chars: int, key: int) -> str:
    """An excerpt from anywhere in the text, but so that it is not much shorter than allowed."""
    last = len(text) - max_chars
    if last <= 0:
        return text.strip()
    starts = [0, *(i + 1 for i in range(last) if text[i] == "\n" and not text[i + 1].isspace())]
    return excerpt(text[starts[key % len(starts)] :], max_chars).strip()


def draw_prompts(
    styles: Sequence[Style], material: Material, count: int, seed: int
) -> Iterator[DrawnPrompt]:
    """`count` different prompts, the styles mixed evenly from first to last by their shares.

    Raises `UserError` when a style has fewer combinations than its share asks for.
    """
    quotas = split_by_share([style.share for style in styles], count)
    rows = []
    for style, quota in zip(styles, quotas, strict=True):
        available = _combinations(style, material)
        if quota > available:
            parts = " x ".join(f"{material.sizes()[f]} {f}s" for f in style.fields) or "no fields"
            raise UserError(
                f"synthesise.prompts={count}: {quota} of them are of style {style.name!r}, which "
                f"has {available} different ones ({parts}); add topics, audiences or seeds, or "
                "raise synthesise.samples instead"
            )
        rows.append(rows_for_step(available, derive_seed(seed, "prompts", style.name), 0, quota))
    return _fill_all(styles, material, rows)


def _fill_all(
    styles: Sequence[Style], material: Material, rows: Sequence[np.ndarray]
) -> Iterator[DrawnPrompt]:
    places = np.concatenate([(np.arange(len(r)) + 0.5) / max(len(r), 1) for r in rows])
    owners = np.concatenate([np.full(len(r), i) for i, r in enumerate(rows)])
    combinations = np.concatenate(rows)
    for place in np.lexsort((owners, places)):
        yield _fill(styles[owners[place]], material, int(combinations[place]))


def _combinations(style: Style, material: Material) -> int:
    sizes = material.sizes()
    return math.prod(sizes[field] for field in style.fields)


def _fill(style: Style, material: Material, number: int) -> DrawnPrompt:
    """The combination `number`, read as digits whose bases are the sizes of the fields."""
    chosen: dict[str, int] = {}
    for field in style.fields:
        number, chosen[field] = divmod(number, material.sizes()[field])
    values: dict[str, str] = {}
    if "topic" in chosen:
        values["topic"] = material.topics[chosen["topic"]]
    if "audience" in chosen:
        values["audience"] = material.audiences[chosen["audience"]]
    seed = material.seeds[chosen["seed"]] if "seed" in chosen else None
    if seed is not None:
        values["seed"] = seed.text
    return DrawnPrompt(
        text=style.fill(values),
        style=style,
        topic=values.get("topic"),
        audience=values.get("audience"),
        seed_document=seed.doc_id if seed is not None else None,
    )


def split_by_share(shares: Sequence[float], count: int) -> list[int]:
    """Whole numbers in proportion to `shares` that add up to `count` (largest remainders)."""
    exact = [count * share / sum(shares) for share in shares]
    parts = [math.floor(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: (parts[i] - exact[i], i))
    for index in order[: count - sum(parts)]:
        parts[index] += 1
    return parts
