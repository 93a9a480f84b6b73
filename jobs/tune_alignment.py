"""What a search over reinforcement learning asks for beyond one over other training stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from actors.placement import count_resources
from jobs import align
from jobs.asking import locate_asked
from jobs.entry import section
from raylign.config import AlignConfig, Recipe, UserError
from raylign.run import Run
from raylign.tracking import read_lines


def check_stages(run: Run, recipes: Mapping[str, Recipe]) -> None:
    """The stage of each recipe, by what was changed in it, must be one that can begin. Raises
    `UserError`."""
    models: dict[tuple[Path | None, Path | None], Path] = {}  # to locate one is to hash it
    for changed, recipe in recipes.items():
        config = section(recipe, "align", AlignConfig)
        asked = config.model, config.prompts
        if asked not in models:
            models[asked], _, _ = locate_asked(run, *asked, "align")
        try:
            align.check(config, models[asked])
        except UserError as error:
            raise UserError(f"{changed}: {error}") from None


def require_room(trials: int, recipe: Recipe) -> None:
    """Raises `UserError` when so many trials at once, of this recipe each, do not fit the cluster:
    their workers would wait for each other's without end."""
    config = section(recipe, "align", AlignConfig)
    present = ray.cluster_resources()
    for kind, each in count_resources(config).items():
        wanted, there = trials * each, present.get(kind, 0.0)
        if wanted > there + 1e-9:
            raise UserError(
                f"tune: {trials} trials at once need {wanted:g} {kind} (each {each:g}, of which "
                f"a learner's rank takes tune.{kind.lower()}s), the cluster has {there:g}; lower "
                f"tune.concurrent, tune.{kind.lower()}s or align.*.{kind.lower()}s"
            )


def read_samples(file: Path) -> list[dict[str, Any]]:
    """Rows of `step`, `prompt` and `text`: of every example group the completion in the middle, by
    reward."""
    return [
        {
            "step": row["step"] + 1,  # counts steps done
            "prompt": row["prompt"],
            "text": row["completions"][len(row["completions"]) // 2]["text"],
        }
        for row in read_lines(file)
    ]
