"""Training on judged answers: margins rise, and held-out answers are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raylign.algorithms.preference import LOSSES
from raylign.config import EngineConfig, OptimizerConfig, ScheduleConfig
from raylign.data.comparisons import Answer, Compared
from raylign.models.assembly import ModelPlan
from raylign.models.heads import build_scorer
from raylign.tracking import METRICS_FILE, read_lines
from raylign.training.compared_rows import write_compared
from raylign.training.comparisons import PreferenceObjective, RewardObjective
from raylign.training.loop import SupervisedLoop, SupervisedTask
from raylign.training.references import Reference


def make(prompt: Sequence[int], *answers: Sequence[int], value: float = 0.0) -> Compared:
    each = (Answer(np.array(a, np.int32), np.ones(len(a), np.uint8)) for a in answers)
    return Compared(np.array(prompt, np.int32), tuple(each), value)


@dataclass(frozen=True, slots=True)
class ScorerPlan(ModelPlan):
    def build(self) -> Any:
        return build_scorer(self.start, "score", self.seed)  # type: ignore[arg-type]


def draw_preferences(count: int, seed: int) -> list[Compared]:
    """Whatever the prompt, an answer of even tokens is better than one of odd tokens."""
    stream = np.random.default_rng(seed)

    def answer(parity: int) -> list[int]:
        return [*(stream.integers(2, 28, stream.integers(2, 6)) * 2 + parity).tolist(), 1]

    return [make([2, *stream.integers(4, 56, 3), 3], answer(0), answer(1)) for _ in range(count)]


def make_task(output: Path, model: ModelPlan, objective: Any, tokenizer: Path) -> SupervisedTask:
    output.mkdir(exist_ok=True)
    return SupervisedTask(
        name="preference",
        output=output,
        model=model,
        tokenizer=tokenizer,
        objective=objective,
        seed=0,
        steps=30,
        batch_size=16,
        micro_batch_size=8,
        checkpoint_every=15,
        optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=3),
        engine=EngineConfig(backend="torch"),
        threads=1,
        prompts=(),
        sample_tokens=1,
    )


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("preferences")
    write_compared(draw_preferences(400, 0), directory, "train")
    write_compared(draw_preferences(60, 1), directory, "validation")
    return directory


def test_a_reward_model_learns_to_tell_answers_apart(
    preferences: Path, tiny_model: Path, tmp_path: Path
) -> None:
    plan = ScorerPlan(tiny_model, seed=1)
    objective = RewardObjective(preferences, "pairs", 0)
    SupervisedLoop(make_task(tmp_path / "out", plan, objective, tiny_model)).run()
    rows = read_lines(tmp_path / "out" / METRICS_FILE)
    assert rows[-1]["validation_rewards/accuracy"] > 0.9
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_a_policy_learns_to_prefer(
    name: str, preferences: Path, tiny_model: Path, tmp_path: Path
) -> None:
    objective = PreferenceObjective(
        preferences,
        name,
        LOSSES[name].numbers,
        0,
        reference=Reference(tmp_path / "cache") if name == "dpo" else None,
    )
    SupervisedLoop(
        make_task(tmp_path / "out", ModelPlan(tiny_model, 0), objective, tiny_model)
    ).run()
    rows = read_lines(tmp_path / "out" / METRICS_FILE)
    assert [row["step"] for row in rows if "validation_rewards/accuracy" in row] == [15, 30]
    if name == "dpo":  # at first the policy is its reference
        assert rows[0]["rewards/margin"] == pytest.approx(0.0, abs=1e-4)
        assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert rows[-1]["rewards/margin"] > rows[0]["rewards/margin"] + 0.5
    assert rows[-1]["validation_rewards/accuracy"] > 0.9


@pytest.mark.parametrize(("name", "weight"), [("orpo", 0.0), ("simpo", 0.5)])
def test_validation_does_not_depend_on_how_rows_are_cut(
    name: str, weight: float, tiny_model: Path, tmp_path: Path
) -> None:
    """Few and many chosen tokens: a mean of means would weigh them by micro-batch."""
    stream = np.random.default_rng(1)
    rows = [make([2, 3], stream.integers(4, 56, n).tolist(), [5, 6]) for n in (2, 40, 3)]
    for split in ("train", "validation"):
        write_compared(rows, tmp_path / "rows", split)
    objective = PreferenceObjective(tmp_path / "rows", name, LOSSES[name].numbers, 0, weight)
    found = []
    for size in (1, 2, 3):
        task = make_task(tmp_path / str(size), ModelPlan(tiny_model, 0), objective, tiny_model)
        task = replace(task, steps=1, checkpoint_every=1, batch_size=3, micro_batch_size=size)
        SupervisedLoop(task).run()
        found.append(read_lines(task.output / METRICS_FILE)[-1])
    for row in found[1:]:
        assert row["validation_loss"] == pytest.approx(found[0]["validation_loss"], rel=1e-5)
    assert found[0]["validation_cross_entropy"] > 1
