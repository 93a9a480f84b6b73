"""Which of a run's completions are shown: as many as a page can hold, of all kinds and times."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

BUDGET = 3_000_000
TOKEN_SHARE, PROMPT_SHARE = 0.5, 0.75
PROMPTS_FOLLOWED = 12
TEXT_CHARS, TOKENS = 6000, 1200
# Bytes of a row besides its text, and of a token besides its own.
ROW_BYTES, TOKEN_BYTES = 260, 26


@dataclass(frozen=True, slots=True)
class Samples:
    """Completions to look at; rows as `jobs.align` writes them, in the order of the file."""

    rows: tuple[Mapping[str, Any], ...]
    total: int
    """Completions in the file."""
    steps: int
    """Steps in the file."""


NOTHING = Samples((), 0, 0)


@dataclass(slots=True)
class _Index:
    """What is known of every row without holding it; a file may be larger than the memory."""

    offsets: array[int] = field(default_factory=lambda: array("q"))
    steps: array[int] = field(default_factory=lambda: array("q"))
    rewards: array[float] = field(default_factory=lambda: array("d"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    prompts: array[int] = field(default_factory=lambda: array("q"))
    fates: array[int] = field(default_factory=lambda: array("q"))
    detailed: array[int] = field(default_factory=lambda: array("b"))


def read_samples(file: Path, budget: int = BUDGET) -> Samples:
    """Completions from a file of rollouts, worth at most `budget` bytes of a page.

    First some that are known token by token, then the prompts that came most often at every step
    they came, then each step's best, worst and middle one and one of each kind that was left out,
    then any; of each sort, steps that lie far apart first. The same file gives the same choice.
    """
    if not file.is_file():
        return NOTHING
    index = _read_index(file)
    by_step: dict[int, list[int]] = {}
    for row, step in enumerate(index.steps):
        by_step.setdefault(step, []).append(row)
    order = list(_spread(sorted(by_step)))
    chosen = dict.fromkeys(
        [
            *_take(_list_detailed(index, by_step, order), index, TOKEN_SHARE * budget),
            *_take(_follow_prompts(index), index, (PROMPT_SHARE - TOKEN_SHARE) * budget),
        ]
    )
    chosen |= dict.fromkeys(_list_marked(index, by_step, order))
    if sum(index.sizes[row] for row in chosen) < budget:
        chosen |= dict.fromkeys(_shuffle(index))
    rows = _read_rows(file, index, chosen, budget)
    return Samples(tuple(rows), len(index.steps), len(by_step))


def write_json_text(value: Any) -> str:
    """JSON that may stand inside a `script` element: nothing in it can end the element or begin
    another, and no address is spelled out."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for mark, shown in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"), ("://", ":\\/\\/")):
        text = text.replace(mark, shown)
    return text


def _read_index(file: Path) -> _Index:
    index, prompts, fates, place = _Index(), dict[str, int](), dict[str, int](), 0
    with file.open("rb") as stream:
        for line in stream:
            row = _parse(line)
            if row is not None:
                tokens = row.get("tokens")
                size = ROW_BYTES + min(len(str(row.get("completion") or "")), TEXT_CHARS)
                if tokens:
                    shown = tokens["texts"][:TOKENS]
                    size += sum(map(len, shown)) + TOKEN_BYTES * len(shown)
                reward = row.get("reward")
                index.offsets.append(place)
                index.steps.append(int(row["step"]))
                index.rewards.append(float("nan") if reward is None else float(reward))
                index.sizes.append(size)
                prompt, fate = str(row.get("prompt_id")), str(row.get("left_out"))
                index.prompts.append(prompts.setdefault(prompt, len(prompts)))
                index.fates.append(fates.setdefault(fate, len(fates)))
                index.detailed.append(bool(tokens))
            place += len(line)
    return index


def _parse(line: bytes) -> dict[str, Any] | None:
    """A row; None for a line cut short, or one that is something else."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _spread(items: list[int]) -> Iterator[int]:
    """First, last, middle, quarters, eighths..."""
    seen: set[int] = set()
    stride = max(1, len(items) - 1)
    while len(seen) < len(items):
        for place in [*range(0, len(items), stride), len(items) - 1]:
            if place not in seen:
                seen.add(place)
                yield items[place]
        stride = max(1, stride // 2)


def _take(rows: Iterable[int], index: _Index, budget: float) -> Iterator[int]:
    for row in rows:
        budget -= index.sizes[row]
        if budget < 0:
            return
        yield row


def _list_detailed(
    index: _Index, by_step: Mapping[int, list[int]], order: list[int]
) -> Iterator[int]:
    for step in order:
        yield from (row for row in by_step[step] if index.detailed[row])


def _follow_prompts(index: _Index) -> Iterator[int]:
    """Best and worst completion of the prompts that came at most steps, at each."""
    met: dict[int, dict[int, list[int]]] = {}
    for row, (prompt, step) in enumerate(zip(index.prompts, index.steps, strict=True)):
        met.setdefault(prompt, {}).setdefault(step, []).append(row)
    recurring = [steps for steps in met.values() if len(steps) > 1]
    for steps in sorted(recurring, key=lambda steps: -len(steps))[:PROMPTS_FOLLOWED]:
        for step in _spread(sorted(steps)):
            ranked = _rank(index, steps[step])
            yield from dict.fromkeys((ranked[0], ranked[-1]))


def _list_marked(
    index: _Index, by_step: Mapping[int, list[int]], order: list[int]
) -> Iterator[int]:
    for step in order:
        ranked = _rank(index, by_step[step])
        yield from (ranked[0], ranked[-1], ranked[len(ranked) // 2])
        yield from {index.fates[row]: row for row in reversed(by_step[step])}.values()


def _rank(index: _Index, rows: list[int]) -> list[int]:
    """Best first; those without a reward last."""
    worth = {row: index.rewards[row] for row in rows}
    return sorted(rows, key=lambda row: -worth[row] if worth[row] == worth[row] else float("inf"))


def _shuffle(index: _Index) -> list[int]:
    """All rows in an order that is arbitrary, and always the same."""
    return sorted(
        range(len(index.steps)), key=lambda row: xxhash.xxh3_64_intdigest(row.to_bytes(8, "big"))
    )


def _read_rows(
    file: Path, index: _Index, chosen: Iterable[int], budget: int
) -> list[dict[str, Any]]:
    """The chosen rows up to what their real size allows, shortened where they are very long."""
    found: dict[int, dict[str, Any]] = {}
    with file.open("rb") as stream:
        for row in chosen:
            stream.seek(index.offsets[row])
            read = _shorten(json.loads(stream.readline()))
            budget -= len(write_json_text(read)) if budget > 0 else 0
            if budget <= 0:
                break
            found[row] = read
    return [found[row] for row in sorted(found)]


def _shorten(row: dict[str, Any]) -> dict[str, Any]:
    text = row.get("completion")
    if isinstance(text, str) and len(text) > TEXT_CHARS:
        more = f"\n[{len(text) - TEXT_CHARS:,} more characters in rollouts.jsonl]"
        row["completion"] = text[:TEXT_CHARS] + more
    tokens = row.get("tokens")
    if tokens and len(tokens["texts"]) > TOKENS:
        row["tokens"] = {name: values[:TOKENS] for name, values in tokens.items()}
        row["tokens"]["more"] = len(tokens["texts"]) - TOKENS
    return row
