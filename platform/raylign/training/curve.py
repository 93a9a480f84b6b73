"""The loss over the steps, as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CURVE_FILE = "curve.svg"


def draw_curve(rows: Sequence[Mapping[str, Any]], title: str, file: Path) -> None:
    """Training and validation loss of the rows of a metrics file; nothing without rows.

    A reader sees the old picture or the new one.
    """
    trained = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    checked = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    if not trained:
        return
    import matplotlib
    from matplotlib.figure import Figure

    # Names inside the file that are the same every time; text as text.
    with matplotlib.rc_context({"svg.hashsalt": "loss", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*zip(*trained, strict=True), color="#4878a8", linewidth=1.2, label="training")
        if checked:
            style: dict[str, Any] = {
                "color": "#c8553d",
                "marker": "o",
                "markersize": 3.5,
                "linewidth": 1.6,
            }
            axes.plot(*zip(*checked, strict=True), label="validation", **style)
            step, loss = checked[-1]
            axes.annotate(
                f"{loss:.3f}", (step, loss), (-4, 8), textcoords="offset points", ha="right"
            )
        axes.set(title=title, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        temporary = file.with_name(f".{file.name}")
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    os.replace(temporary, file)
