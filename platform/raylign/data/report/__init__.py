"""The data report: what was read, what became of it and why, for people and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raylign.data.report.gathering import gather
from raylign.data.report.material import STAGES, read_material
from raylign.data.report.page import render_page
from raylign.run import write_json

__all__ = ["STAGES", "build_report", "gather", "read_material"]


def build_report(run_root: Path, output: Path) -> dict[str, Any]:
    """Write `data.html` and `data.json` into `output`; returns the JSON's content.

    Reads the finished data stages of `run_root`; those that are missing are left out and named in a
    note. Equal stages give equal files, but for the times that their manifests hold. Raises
    `UserError` when there is no `documents` stage.
    """
    data = gather(read_material(run_root))
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "data.json", data)
    (output / "data.html").write_text(render_page(data), encoding="utf-8")
    return data
