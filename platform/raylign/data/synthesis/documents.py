"""Outputs as documents that say where they are from, and parts of the `synthetic` stage."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from raylign.data.documents import DOCUMENTS
from raylign.data.synthesis.answers import Answer
from raylign.data.synthesis.filters import REASONS
from raylign.data.synthesis.prompts import DrawnPrompt
from raylign.data.tables import write_parquet

DOMAIN = "synthetic"

REJECTED = DOCUMENTS.append(pa.field("reasons", pa.list_(pa.string())))
PROMPTS = pa.schema([("prompt_hash", pa.string()), ("prompt", pa.large_string())])


@dataclass(frozen=True, slots=True)
class Teacher:
    """The model that wrote, as provenance names it."""

    name: str
    content: str
    """Content hash."""
    sampling: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Output:
    """One answer, judged."""

    key: str
    """Of the request, and with that the document's id."""
    prompt: DrawnPrompt
    sample: int
    """Which of the prompt's samples."""
    seed: int
    """It was sampled with."""
    answer: Answer
    text: str
    """What `raylign.data.synthesis.filters.read_answer` takes from the answer."""
    reasons: tuple[str, ...]
    """Why it is rejected; empty when accepted."""


def describe_origin(output: Output, teacher: Teacher) -> dict[str, Any]:
    """The provenance of a document, for its `meta`."""
    return {
        "synthetic": True,
        "model": teacher.name,
        "model_hash": teacher.content,
        "weights_version": output.answer.version,
        "style": output.prompt.style.name,
        "topic": output.prompt.topic,
        "audience": output.prompt.audience,
        "seed_document": output.prompt.seed_document,
        "prompt_hash": output.prompt.hash,
        "sample": output.sample,
        "sampling": teacher.sampling | {"seed": output.seed},
        "finish_reason": output.answer.finish_reason,
        "tokens": output.answer.tokens,
    }


def to_table(outputs: Sequence[Output], teacher: Teacher, schema: pa.Schema) -> pa.Table:
    """Outputs as rows of `DOCUMENTS` or `REJECTED`."""
    rows = [
        {
            "doc_id": output.key,
            "source": DOMAIN,
            "domain": DOMAIN,
            "origin": f"{output.prompt.style.name}, sample {output.sample} of prompt "
            f"{output.prompt.hash[:12]}",
            "meta": json.dumps(describe_origin(output, teacher), sort_keys=True),
            "text": output.text,
            "reasons": list(output.reasons),
        }
        for output in outputs
    ]
    columns = {name: [row.get(name) for row in rows] for name in schema.names}
    return pa.table(columns, schema=schema)


@dataclass(slots=True)
class Tally:
    """What became of the outputs so far."""

    outputs: int = 0
    accepted: int = 0
    tokens: int = 0
    """Sampled for all outputs."""
    accepted_tokens: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Outputs with each reason; one output may have several."""
    styles: dict[str, Counter[str]] = field(default_factory=dict)
    """Style to `outputs` and `accepted`."""

    def add(self, output: Output) -> None:
        """Count one output."""
        accepted = not output.reasons
        self.outputs += 1
        self.accepted += accepted
        self.tokens += output.answer.tokens
        self.accepted_tokens += output.answer.tokens * accepted
        self.reasons.update(output.reasons)
        style = self.styles.setdefault(output.prompt.style.name, Counter())
        style.update({"outputs": 1, "accepted": int(accepted)})

    def to_json(self) -> dict[str, Any]:
        """For `tally.json`: reasons in the order of `REASONS`, those that occurred."""
        return {
            "outputs": self.outputs,
            "accepted": self.accepted,
            "tokens": self.tokens,
            "accepted_tokens": self.accepted_tokens,
            "rejected_for": {r: self.reasons[r] for r in REASONS if self.reasons[r]},
            "styles": {name: dict(counts) for name, counts in sorted(self.styles.items())},
        }


class PartWriter:
    """Writes outputs, in their order, as parts of at most `size` outputs: `documents/`,
    `rejected/` and the prompts of both."""

    def __init__(self, directory: Path, teacher: Teacher, size: int) -> None:
        self._directory, self._teacher, self._size = directory, teacher, size
        self._open: list[Output] = []
        self.parts = 0
        for name in ("documents", "rejected", "prompts"):
            (directory / name).mkdir(parents=True, exist_ok=True)

    def add(self, output: Output) -> None:
        """Append an output; a full part is written at once."""
        self._open.append(output)
        if len(self._open) >= self._size:
            self._flush()

    def close(self) -> None:
        """Write what is left; at least one part, so that readers find the columns."""
        if self._open or not self.parts:
            self._flush()

    def _flush(self) -> None:
        kept = [output for output in self._open if not output.reasons]
        rejected = [output for output in self._open if output.reasons]
        prompts = {output.prompt.hash: output.prompt.text for output in self._open}
        name = f"part-{self.parts:05d}.parquet"
        write_parquet(
            to_table(kept, self._teacher, DOCUMENTS), self._directory / "documents" / name
        )
        write_parquet(
            to_table(rejected, self._teacher, REJECTED), self._directory / "rejected" / name
        )
        write_parquet(
            pa.table([list(prompts), list(prompts.values())], schema=PROMPTS),
            self._directory / "prompts" / name,
        )
        self._open = []
        self.parts += 1
