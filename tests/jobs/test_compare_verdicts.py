"""What `compare` writes for a judge to learn from, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylign.config import UserError
from raylign.data.chat import read_demonstrations
from raylign.models.loading import load_tokenizer
from raylign.rewards.rubric import load_rubric
from raylign.run import Run
from raylign.tracking import read_lines
from tests.jobs.test_compare_job import make, write_recipe
from tests.tiny_model import write_speller

VERDICTS = {"rubric": "Good?\n{prompt}\n{completion}", "scale": [0, 40]}


@pytest.mark.slow
def test_every_completion_becomes_a_question_with_its_verdict(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_model, limit=2, verdicts=VERDICTS)
    stage = make(recipe)
    judged = {
        (row["id"], row["prompt"], row["completion"]): row["reward"]
        for row in read_lines(stage / "completions.jsonl")
    }
    rubric = load_rubric(VERDICTS["rubric"], False, (0, 40), brief=True)
    special = ["<pad>", "<eos>", "<user>", "<assistant>", "<unk>"]
    rows = read_lines(stage / "verdicts.jsonl")
    assert rows == [
        {
            "id": name,
            "messages": [
                {"role": "user", "content": rubric.render(prompt, [text], "", special)},
                {"role": "assistant", "content": f'{{"score":{len(set(text))}}}'},
            ],
        }
        for (name, prompt, text), _ in judged.items()
    ]
    assert len({row["messages"][1]["content"] for row in rows}) > 1
    summary = Run(recipe.run).require("comparisons", "compare").manifest.summary
    assert summary["verdicts"] == len(rows)
    reader = load_tokenizer(write_speller(tmp_path / "speller"))
    found = read_demonstrations(stage / "verdicts.jsonl", reader, 512)
    assert found.rows == len(rows) and found.format == "messages"


def test_a_rubric_that_cannot_be_used_is_refused_at_once(tiny_model: Path, tmp_path: Path) -> None:
    verdicts = {"rubric": "{first} {second}"}
    with pytest.raises(UserError, match=r"compare\.verdicts\.rubric: \{first\} has no place"):
        make(write_recipe(tmp_path, tiny_model, verdicts=verdicts))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="scale has no effect with compare=true"):
        write_recipe(tmp_path, tiny_model, verdicts={"compare": True, "scale": [0, 2]})
