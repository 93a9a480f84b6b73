"""Folding an adapter into its base: `python -m jobs.merge recipe.yaml [merge.key=value ...]`.

Writes the `merge` stage: `model/`, a plain Hugging Face directory that needs neither peft nor
bitsandbytes, with how far its logits are from those of base and adapter together.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from jobs.entry import main, perform, section
from raylign.config import MergeConfig, Recipe, UserError
from raylign.models.folding import is_adapter, locate_base
from raylign.models.hub import identify_model
from raylign.models.merging import merge_adapter, require_mergeable
from raylign.run import Draft, Run, content_hash
from raylign.tracking import ProgressBoard

# Stages that may have trained an adapter, the last of the journey first.
TRAINED = ("preference", "reward_model", "sft", "pretrain")


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `merge` stage."""
    config = section(recipe, "merge", MergeConfig)
    adapter = find_adapter(run, config.adapter)
    require_mergeable(adapter)
    base = locate_base(adapter, config.model)
    base = base / "model" if (base / "model").is_dir() else base
    parents = {"adapter": content_hash(adapter), "model": identify_model(base)}

    def build(draft: Draft) -> None:
        with board.bar("merge", 1) as bar:
            bar.update(0, f"{adapter} into {base}")
            proof = merge_adapter(adapter, base, draft.path / "model", config.output_dtype)
            bar.update(1, "")
        draft.summary.update(asdict(proof), adapter=str(adapter), base=str(base))
        board.say(
            f"  merged and adapted logits differ by at most {proof.difference:.1e} "
            f"({proof.stored_difference:.1e} as stored; the largest is {proof.largest_logit:.1f})"
        )

    perform(run, "merge", {"merge": config.model_dump(mode="json")}, parents, board, build)


def find_adapter(run: Run, given: Path | None) -> Path:
    """The adapter's directory: the one that the user gave, or a stage's with one inside; else of
    the run's last trained stage that has one. Raises `UserError` when there is none."""
    if given is not None:
        for place in (given, given / "adapter"):
            if is_adapter(place):
                return place.absolute()
        raise UserError(f"merge.adapter={given} holds no adapter: adapter_config.json is missing")
    for name in TRAINED:
        stage = run.find(name)
        if stage is not None and is_adapter(stage.path / "adapter"):
            return stage.path / "adapter"
    raise UserError(
        f"run {run.root} has no stage with an adapter; train one with peft=lora or another, or "
        "name a directory in merge.adapter"
    )


if __name__ == "__main__":
    main("merge", run)
