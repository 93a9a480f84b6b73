"""Pairs from a model's own completions: the real job on a tiny model, and what takes its pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from jobs import compare
from jobs.comparisons import locate_data
from raylign.config import Recipe, UserError, load_recipe
from raylign.data.comparisons import Wanted, read_comparisons
from raylign.models.loading import load_tokenizer
from raylign.run import Run
from raylign.tracking import ProgressBoard, read_lines

REWARD = "tests.jobs.user_rewards:reward_variety"


def write_recipe(directory: Path, policy: Path, run: str = "run", **changes: Any) -> Recipe:
    """Four completions of each of six prompts; the more characters, the better."""
    prompts = directory / "prompts.jsonl"
    rows = ({"id": f"p{n}", "prompt": f"w{n} w{n + 9}", "reference": f"w{n}"} for n in range(6))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "model": str(policy),
        "prompts": str(prompts),
        "completions": 4,
        "pairs": 2,
        "sampling": {"max_tokens": 8},
        "rollout": {"backend": "transformers", "count": 1},
        "reward": {"source": REWARD},
    }
    body = {"run": str(directory / run), "seed": 3, "compare": settings | changes}
    file = directory / "recipe.yaml"
    file.write_text(yaml.safe_dump(body), encoding="utf-8")
    return load_recipe(file)


def make(recipe: Recipe) -> Path:
    compare.run(recipe, Run(recipe.run), ProgressBoard(Console(quiet=True)))
    return recipe.run / "comparisons"


@pytest.mark.slow
def test_a_better_and_a_worse_completion_of_the_same_prompt(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_model)
    stage = make(recipe)
    completions, pairs = (read_lines(stage / f"{n}.jsonl") for n in ("completions", "pairs"))
    assert [row["id"] for row in completions] == [f"p{n}" for n in range(6) for _ in range(4)]
    rewards = {(row["prompt"], row["completion"]): row["reward"] for row in completions}
    assert len(set(rewards.values())) > 3
    for (_, text), reward in rewards.items():
        assert reward == pytest.approx(len(set(text)) / 40)
    for pair in pairs:
        [asked], [better], [worse] = pair["prompt"], pair["chosen"], pair["rejected"]
        assert (asked["role"], better["role"], worse["role"]) == ("user", *["assistant"] * 2)
        gap = (
            rewards[asked["content"], better["content"]]
            - rewards[asked["content"], worse["content"]]
        )
        assert gap > 0 and pair["margin"] == pytest.approx(gap)
    summary = Run(recipe.run).require("comparisons", "compare").manifest.summary
    assert summary["pairs"] == len(pairs) > 6 and summary["completions"] == 24

    # The jobs that learn from pairs find them by themselves, and can use every one of them.
    for name in ("reward_model", "preference"):
        file, _ = locate_data(Run(recipe.run), None, name)
        wanted = Wanted("pairs", name, 64, "drop", "auto", "\n")
        found = read_comparisons(file, load_tokenizer(tiny_model), wanted)
        assert len(found.items) == len(pairs) and not found.rejected

    make(recipe)  # finished: nothing is asked again
    with pytest.raises(UserError, match=r"made with compare.completions=4, not 6; .*redo=compar"):
        make(write_recipe(tmp_path, tiny_model, completions=6))
    again = make(write_recipe(tmp_path, tiny_model, run="again"))
    assert (again / "pairs.jsonl").read_text() == (stage / "pairs.jsonl").read_text()
    with pytest.raises(
        UserError, match=r"no two completions .* more than 9 apart .*rejected: none"
    ):
        make(write_recipe(tmp_path, tiny_model, run="far", least_gap=9.0))
    assert not (tmp_path / "far" / "comparisons").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": {"source": "arithmetics"}}, "did you mean 'arithmetic'"),
        ({"reward": {"source": "judge"}}, "give judge.model or judge.endpoint"),
        ({"judge": {"endpoint": "http://localhost/v1"}}, "endpoint and endpoint_model go together"),
        ({"pairs": 3}, "pairs=3 needs 6 completions or more"),
        ({"completions": 1}, "greater than or equal to 2"),
        ({"sampling": {"temperature": 0}}, "gives the same completion every time"),
        ({"prompts": "nowhere.jsonl"}, "compare.prompts=nowhere.jsonl: no such file"),
        ({"model": "nowhere"}, "compare.model=nowhere: no such file"),
        ({"sampling": {"max_tokens": 62}}, r"prompts.jsonl:1: prompt of 4 tokens and compare\.sam"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    ray_cluster: None, tmp_path: Path, tiny_model: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make(write_recipe(tmp_path, tiny_model, **changes))
    assert "\n" not in str(caught.value)
