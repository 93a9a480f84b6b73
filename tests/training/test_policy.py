"""An update does not depend on how its batch was split; mismatch is told from staleness."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from learning import (
    LENGTHS,
    RATES,
    learn,
    make_learner,
    make_trajectories,
    shift_reward,
    weights_of,
)

from raylign.algorithms.catalog import ALGORITHMS
from raylign.models.loading import load_model
from raylign.models.logprobs import score_tokens
from raylign.records import Trajectory, collate
from raylign.training.engine import DivergenceError
from raylign.training.policy import Divergence, Rates


@pytest.fixture(scope="module")
def trajectories(tiny_model: Path) -> list[Trajectory]:
    return make_trajectories(tiny_model)


@pytest.mark.parametrize(
    ("algorithm", "minibatches"), [("ppo", 1), ("grpo", 1), *((name, 2) for name in ALGORITHMS)]
)
def test_any_split_gives_the_same_policy(
    tiny_model: Path, trajectories: list[Trajectory], algorithm: str, minibatches: int
) -> None:
    """Every row of the catalog, from whole batches and from micro-batches of one or two rows."""
    given: dict[str, Any] = {"passes": 2, "minibatches": minibatches}
    whole, pieces = (make_learner(tiny_model, algorithm, sample=3) for _ in range(2))
    expected = learn(whole, trajectories, **given)
    found = learn(pieces, trajectories, budget=30, **given)
    # Adam makes a step of up to 1e-3 of any gradient, and of the rounding in a small one too.
    theirs = weights_of(pieces)
    gaps = torch.cat([(theirs[n] - t).abs().flatten() for n, t in weights_of(whole).items()])
    assert float(gaps.mean()) < 1e-7 and float(gaps.max()) < 2e-4
    assert found.metrics.keys() == expected.metrics.keys()
    for name, metric in expected.metrics.items():
        # What a ratio, or a rival that is the same at first, exceeds may be decided by rounding.
        slack = 0.5 if "fraction" in name or "accuracy" in name else 2e-4
        assert found.metrics[name].mean == pytest.approx(metric.mean, abs=slack), name
    assert found.advantages == pytest.approx(expected.advantages, abs=1e-4)


def test_a_reference_says_what_the_policy_says_until_that_moves(
    tiny_model: Path, trajectories: list[Trajectory]
) -> None:
    learner = make_learner(tiny_model)
    ones = [1.0] * len(trajectories)
    batch = collate(trajectories, ones, ones, pad_id=0)
    own, reference = learner.scores.old(batch), learner.scores.reference(batch)
    assert own is not None and reference is not None
    assert torch.equal(own[batch.loss_mask], reference[batch.loss_mask])
    learn(learner, trajectories)
    moved, still = learner.scores.old(batch), learner.scores.reference(batch)
    assert moved is not None and still is not None
    assert torch.equal(still, reference) and not torch.equal(
        moved[batch.loss_mask], own[batch.loss_mask]
    )


def test_minibatches_are_steps_of_their_own(
    tiny_model: Path, trajectories: list[Trajectory]
) -> None:
    """Two half batches in one update are two updates, but for the old policy, which is the same
    while nothing is clipped: at a rate this small nothing is."""
    rates, given = Rates(lr=1e-5), {"kl_coef": 0.0}
    learner = make_learner(tiny_model, "reinforce_pp", **given)
    found = learn(learner, trajectories, rates, minibatches=2)
    assert found.metrics["grad_norm"].count == 2
    whole = make_learner(tiny_model, "reinforce_pp", **given)
    assert learn(whole, trajectories, rates).metrics["grad_norm"].count == 1
    start = dict(load_model(tiny_model).named_parameters())
    moved, once = (
        sum(float((t - start[n]).detach().abs().sum()) for n, t in weights_of(each).items())
        for each in (learner, whole)
    )
    assert moved > 1.2 * once


def test_an_update_raises_what_was_rewarded(
    tiny_model: Path, trajectories: list[Trajectory]
) -> None:
    learner = make_learner(tiny_model, kl_coef=0.0)
    zeros = [0.0] * len(trajectories)
    batch = collate(trajectories, zeros, zeros, 0)
    before = score_tokens(load_model(tiny_model), batch.tokens, batch.lengths)[0].detach()
    learned = learn(learner, trajectories)
    after = learner.scores.old(batch)
    assert after is not None
    gain = ((after - before) * batch.loss_mask).sum(1)
    better = torch.tensor([learned.advantages[row] > 0 for row in range(len(trajectories))])
    assert better.tolist() == [False, True] * 4
    assert gain[better].mean() > 0 > gain[~better].mean()


def test_a_coefficient_of_the_step_replaces_the_algorithm_s(
    tiny_model: Path, trajectories: list[Trajectory]
) -> None:
    """As a KL in the reward: the first advantages feel it only when the policy has moved."""
    means = {}
    for coef in (0.0, 5.0):
        learner = make_learner(tiny_model, "rloo", kl_coef=0.1)
        learn(learner, trajectories)
        learner.version = 0
        rates = replace(RATES, kl_coef=coef)
        means[coef] = learn(learner, trajectories, rates).advantages
    assert means[0.0][1] > means[5.0][1]
    assert means[0.0] == pytest.approx(
        {row: (1 if row % 2 else -1) * 1.125 for row in range(len(trajectories))}, abs=1e-5
    )


def test_whitened_advantages_have_no_mean_over_all_tokens(
    tiny_model: Path, trajectories: list[Trajectory]
) -> None:
    learner = make_learner(tiny_model, "reinforce_pp", kl_coef=0.0)
    advantages = learn(learner, trajectories).advantages
    tokens = np.array([t.sampled_tokens for t in trajectories])
    values = np.array([advantages[row] for row in range(len(tokens))])
    assert (values * tokens).sum() == pytest.approx(0, abs=1e-4)
    assert (values**2 * tokens).sum() / (tokens.sum() - 1) == pytest.approx(1, abs=1e-4)


def test_pairs_that_tie_teach_nothing(tiny_model: Path, trajectories: list[Trajectory]) -> None:
    learner = make_learner(tiny_model, "online_dpo")
    same = [replace(t, reward=1.0) for t in trajectories]
    before = weights_of(learner)
    learned = learn(learner, same)
    assert learned.advantages == {} and learner.version == 1
    assert all(torch.equal(before[name], t) for name, t in weights_of(learner).items())


def test_an_entropy_bonus_raises_entropy(tiny_model: Path, trajectories: list[Trajectory]) -> None:
    found = {}
    for coef in (0.0, 0.5):
        learner = make_learner(tiny_model, kl_coef=0.0, entropy_coef=coef)
        for _ in range(3):
            metrics = learn(learner, trajectories).metrics
        found[coef] = metrics["entropy"].mean
    assert found[0.5] > found[0.0] + 1e-3


def test_a_gradient_that_is_no_number_is_no_step(
    tiny_model: Path, trajectories: list[Trajectory]
) -> None:
    learner = make_learner(tiny_model)
    with torch.no_grad():
        learner.engine.lm.get_input_embeddings().weight[4:50] = torch.nan
    norms = {n: t for n, t in weights_of(learner).items() if "norm" in n}
    with pytest.raises(Divergence, match=r"policy at version 0: the norm .*nan") as caught:
        learn(learner, trajectories, minibatches=2)
    assert len(caught.value.rows) == 4 and isinstance(caught.value, DivergenceError)
    assert learner.version == 0
    assert all(torch.equal(weights_of(learner)[name], t) for name, t in norms.items())


@pytest.mark.parametrize("passes", [1, 2])
def test_mismatch_is_measured_at_the_version_that_sampled(
    tiny_model: Path, trajectories: list[Trajectory], passes: int
) -> None:
    learner = make_learner(tiny_model, history=1, sample=len(LENGTHS))
    rates = Rates(lr=1e-2)
    for version in range(2):  # the samples are of version 0, now and when it is past
        learned = learn(learner, trajectories, rates, budget=40, passes=passes)
        assert learned.metrics["mismatch/mean_abs"].mean < 2e-6, version
        assert learned.mismatch_max < 2e-5
        assert learned.metrics["mismatch/unchecked"].total == 0
    current = learner.scores.canary([tuple(trajectories[0].token_ids.tolist())])[0]
    stale = np.abs(current - trajectories[0].logprobs)[trajectories[0].loss_mask].mean()
    assert stale > 1e-3  # staleness alone is a thousand times larger
    learned = learn(learner, trajectories, rates)  # version 0 is forgotten
    assert learned.metrics["mismatch/unchecked"].mean == 1.0
    assert np.isnan(learned.gaps[0]).all() and learned.mismatch_max == 0.0


def test_a_wrong_rollout_logprob_is_seen_where_it_stands(
    tiny_model: Path, trajectories: list[Trajectory]
) -> None:
    wrong = trajectories[0].logprobs.copy()
    wrong[5] += 0.25
    first = replace(trajectories[0], logprobs=wrong)
    learned = learn(make_learner(tiny_model, sample=2), [first, *trajectories[1:]])
    assert learned.mismatch_max == pytest.approx(0.25, abs=1e-4)
    assert learned.gaps.keys() == {0, 1}
    assert learned.gaps[0][5] == pytest.approx(-0.25, abs=1e-4)
    assert np.isnan(learned.gaps[0][:3]).all()
    assert learned.metrics["mismatch/mean_abs"].mean == pytest.approx(0.25 / 13, abs=1e-4)


def test_dropout_is_no_part_of_a_policy(
    tiny_model: Path, tmp_path: Path, trajectories: list[Trajectory]
) -> None:
    """The model says it has some; whoever samples has none."""
    noisy = load_model(tiny_model)
    noisy.config.attention_dropout = 0.5
    noisy.save_pretrained(tmp_path)
    for file in tiny_model.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    found = learn(make_learner(tmp_path, sample=8), trajectories)
    assert found.mismatch_max < 1e-5


def test_rewards_enter_by_differences_within_the_group(
    tiny_model: Path, trajectories: list[Trajectory]
) -> None:
    first, second = (make_learner(tiny_model) for _ in range(2))
    learn(first, trajectories)
    learn(second, shift_reward(trajectories, 2.0))
    theirs = weights_of(second)
    assert all(torch.equal(theirs[name], t) for name, t in weights_of(first).items())
