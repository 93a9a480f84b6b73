"""A search over reinforcement learning: LoRA ranks on the same loop, on real Ray Tune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from jobs import tune
from raylign.config import UserError, load_recipe
from raylign.run import Run
from raylign.tracking import ProgressBoard, read_lines


def write_recipe(directory: Path, model: Path, **changes: Any) -> Path:
    """A search of two LoRA ranks over two steps of reinforcement learning."""
    prompts = directory / "prompts.jsonl"
    rows = ({"prompt": f"w{n} w{n + 9}", "reference": f"w{n}"} for n in range(8))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    stage = {
        "model": str(model),
        "prompts": str(prompts),
        "steps": 2,
        "prompts_per_step": 4,
        "group_size": 4,
        "max_staleness": 0,
        "checkpoint_every": 1,
        "peft": "lora",
        "adapter": {"alpha": 16},
        "optimizer": {"lr": 0.05},
        "schedule": {"shape": "constant", "warmup_steps": 0},
        "sampling": {"max_tokens": 8},
        "reward": {"source": "tests.jobs.user_rewards:reward_variety"},
        "rollout": {"backend": "transformers", "count": 1},
        "learner": {"count": 1, "token_budget": 512},
        "engine": {"backend": "torch"},
        "sinks": {"tensorboard": False},
    }
    search = {
        "stage": "align",
        "space": {"adapter.rank": [2, 8]},
        "search": "grid",
        "scheduler": "none",
        "metric": "reward/total",
        "goal": "max",
        "cpus": 0.3,
    }
    body = {"run": str(directory / "run"), "align": stage, "tune": search | changes}
    file = directory / "recipe.yaml"
    file.write_text(yaml.safe_dump(body), encoding="utf-8")
    return file


@pytest.mark.slow
def test_the_better_rank_is_kept_with_its_recipe(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tiny_model))
    tune.run(recipe, Run(recipe.run), ProgressBoard(Console(quiet=True)))
    stage = recipe.run / "tune"
    rows = read_lines(stage / "trials.jsonl")
    assert sorted(row["values"]["adapter.rank"] for row in rows) == [2, 8]
    assert [row["status"] for row in rows] == ["finished"] * 2
    assert [row["best"] for row in rows] == [True, False]
    small, large = sorted(rows, key=lambda row: row["trainable"])
    assert large["trainable"] == 4 * small["trainable"]
    for row in rows:
        assert [step for step, _ in row["curve"]] == [1, 2]
        assert row["metric"] == max(value for _, value in row["curve"]) > 0
    assert rows[0]["metric"] > rows[1]["metric"]
    rank = rows[0]["values"]["adapter.rank"]
    assert json.loads((stage / "best/adapter/adapter_config.json").read_text())["r"] == rank
    best = load_recipe(stage / "best.yaml")
    assert best.align is not None and best.align.adapter.rank == rank and best.tune is None
    samples = (stage / "samples.md").read_text("utf-8")
    assert samples.count("(adapter.rank=2)") == samples.count("(adapter.rank=8)") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "pbt"}, "scheduler=pbt copies checkpoints, which align cannot adopt"),
        ({"metric": "validation_loss", "goal": "min"}, "align measures no validation_loss"),
        ({"space": {"group_size": [4, 1]}}, "tune.space.group_size=1: align.group_size=1: grpo"),
        ({"space": {"algorithm.name": ["grop"]}}, "tune.space.algorithm.name=grop: align.algo"),
        ({"space": {"steps": [1, 2]}}, "tune compares trials at equal steps"),
        ({"cpus": 0.9}, "tune: 2 trials at once need 2.4 CPU .*the cluster has 2; lower tune.con"),
    ],
)
def test_an_impossible_search_is_refused(
    ray_cluster: None, tmp_path: Path, tiny_model: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        recipe = load_recipe(write_recipe(tmp_path, tiny_model, **changes))
        tune.run(recipe, Run(recipe.run), ProgressBoard(Console(quiet=True)))
