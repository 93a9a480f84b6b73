"""Words and anchors that all chapters share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from raylign.data.report.blocks import visible

Data = Mapping[str, Any]
"""What `gathering.gather` returned, or a part of it."""

NAME_CHARS = 60
DUPLICATES = {"exact_duplicate", "near_duplicate"}
CUTS = {
    "held_out_line": "Lines that held an evaluation item",
    "repeated_passage": "Passages that occur elsewhere",
}
"""Examples of what was cut from documents that stayed, rather than of documents that left."""


def spell(name: str) -> str:
    """A reason or a kind as words."""
    return name.replace("_", " ")


def clip(name: str) -> str:
    """A name that fits into a column."""
    name = visible(name)
    return name if len(name) <= NAME_CHARS else f"{name[: NAME_CHARS - 1]}\N{HORIZONTAL ELLIPSIS}"


def list_targets(data: Data) -> dict[str, str]:
    """Reason to the id of its examples on the page."""
    reasons = sorted({*data["examples"], *(row["reason"] for row in data["rejected"])})
    slugs = (re.sub(r"[^a-z0-9]+", "-", reason.lower()).strip("-") for reason in reasons)
    found = {
        reason: f"why-{number}-{slug}"[:80]
        for number, (reason, slug) in enumerate(zip(reasons, slugs, strict=True))
    }
    if data["duplicates"].get("pairs"):
        found |= dict.fromkeys(DUPLICATES, "duplicates")
    return found


def show_origin(row: Data) -> str:
    """Where a document is from."""
    return str(row.get("url") or row.get("origin") or row.get("source") or "")
