"""Reward models score what transformers scores, whatever the batch, and whose tokens they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from raylign.config import RewardConfig, UserError
from raylign.models.heads import build_scorer
from raylign.models.loading import load_tokenizer, save_model
from raylign.records import Prompt, Trajectory
from raylign.rewards.learned import RewardModel, have_same_tokenizer
from raylign.rewards.outcomes import Rejection
from raylign.rewards.panel import Panel, allow_seconds, check_sources

PROMPT = Prompt("p0", (2, 5, 6, 3), "w1 w2", "")


def make(words: list[int], *, end: bool = True) -> Trajectory:
    tokens = np.array([*PROMPT.token_ids, *words, *([1] if end else [])], np.int32)
    mask = np.arange(len(tokens)) >= len(PROMPT.token_ids)
    return Trajectory(
        "p0",
        "g0",
        tokens,
        mask,
        np.zeros(len(tokens), np.float32),
        np.where(mask, 0, -1).astype(np.int32),
        "stop" if end else "length",
        " ".join(f"w{word - 4}" for word in words),
    )


@pytest.fixture(scope="module")
def stage(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model as its job leaves it."""
    directory = tmp_path_factory.mktemp("reward_model")
    scorer = build_scorer(tiny_model, "score", seed=1)
    save_model(scorer, scorer.config, load_tokenizer(tiny_model), directory / "model")
    return directory


def test_it_is_what_transformers_says(stage: Path, tiny_model: Path) -> None:
    trajectories = [make([7, 8, 9]), make([7]), make([20] * 30, end=False), make([])]
    measured = RewardModel(stage, tiny_model).measure(trajectories, PROMPT)
    peer = AutoModelForSequenceClassification.from_pretrained(stage / "model").eval()
    for trajectory, parts in zip(trajectories, measured, strict=True):
        with torch.no_grad():
            wanted = peer(torch.from_numpy(trajectory.token_ids)[None].long()).logits.item()
        assert isinstance(parts, dict) and parts["score"] == pytest.approx(wanted, abs=1e-5)
    again = RewardModel(stage, tiny_model).measure(trajectories[:1], PROMPT)[0]
    assert again == pytest.approx(measured[0], abs=1e-5)


def test_another_tokenizer_reads_the_conversation(
    stage: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(stage / "model", other)
    fields = json.loads((other / "tokenizer.json").read_text())
    vocabulary = fields["model"]["vocab"]
    vocabulary["w1"], vocabulary["w9"] = vocabulary["w9"], vocabulary["w1"]
    (other / "tokenizer.json").write_text(json.dumps(fields))
    assert not have_same_tokenizer(other, tiny_model) and have_same_tokenizer(
        stage / "model", tiny_model
    )
    trajectory = make([13, 8])  # w9 w4 to the policy, and 5 8 to this model
    swapped = Prompt("p0", (2, 13, 6, 3), "w1 w2", "")
    as_text = RewardModel(other, tiny_model).measure([trajectory], swapped)
    tokens = np.array([2, 13, 6, 3, 5, 8, 1], np.int32)
    mask = np.arange(7) > 3
    nothing = np.zeros(7, np.float32)
    own = Trajectory("p0", "g0", tokens, mask, nothing, np.zeros(7, np.int32), "stop", "")
    assert as_text == [pytest.approx(RewardModel(stage, tiny_model).measure([own], swapped)[0])]
    (other / "chat_template.jinja").unlink()
    config = RewardConfig(source="model", model=other)
    check_sources(config)
    for start in (
        lambda: RewardModel(other, tiny_model),
        lambda: check_sources(config, tiny_model),
    ):
        with pytest.raises(UserError, match="another tokenizer than the policy and no chat temp"):
            start()


def test_what_does_not_fit_is_rejected_and_nothing_else(stage: Path, tiny_model: Path) -> None:
    model = RewardModel(stage, tiny_model)
    short, long = model.measure([make([7]), make([7] * 80)], PROMPT)
    assert long == Rejection("p0", "g0", "longer than the reward model's context")
    assert isinstance(short, dict)


def test_what_is_no_reward_model(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no reward model; train one with"):
        RewardModel(tiny_model)
    steps = build_scorer(tiny_model, "steps", seed=1)
    save_model(steps, steps.config, load_tokenizer(tiny_model), tmp_path / "steps")
    with pytest.raises(UserError, match="scores the steps of an answer"):
        RewardModel(tmp_path / "steps")
    with pytest.raises(UserError, match=r"align\.reward\.model=/no/where is not a directory"):
        check_sources(RewardConfig(source="model", model=Path("/no/where")))


def test_a_panel_of_both_kinds(stage: Path, tiny_model: Path) -> None:
    config = RewardConfig.model_validate(
        {
            "parts": {
                "taste": {"source": "model", "model": str(stage), "weight": 0.5},
                "right": {"source": "exact", "options": {"ignore_case": True}},
                "judged": {"source": "judge"},
            }
        }
    )
    check_sources(config)
    measured = Panel(config, tiny_model).measure([make([5])], PROMPT)
    assert list(measured) == ["taste", "right"] and measured["right"] == [{"correct": 0.0}]
    for parts, says in (
        ({"a": {"source": "exact", "options": {"x": 1}}}, r"parts\.a\.options\.x: exact has no"),
        ({"a": {"source": "exactly"}}, r"parts\.a\.source='exactly': unknown verifier; did you"),
        (
            {"a": {"source": "judge", "options": {"x": 1}}},
            r"options has no effect with source=judge",
        ),
    ):
        with pytest.raises(UserError, match=says):
            check_sources(RewardConfig.model_validate({"parts": parts}))


def test_sources_with_limits_of_their_own_are_given_the_time() -> None:
    parts = {"a": {"source": "code"}, "b": {"source": "math", "options": {"seconds": 3}}}
    config = RewardConfig.model_validate({"parts": parts, "sandbox": {"seconds": 4}})
    assert allow_seconds(config, 8) == 8 * (4 + 2 + 2 * 3 + 2)
    assert allow_seconds(RewardConfig(), 8) == 0
