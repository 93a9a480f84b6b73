"""A critic's values belong to the state before each token, and it learns what returns are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from learning import learn, make_learner, make_trajectories, weights_of

from raylign.algorithms.advantages import gae
from raylign.config import UserError
from raylign.models.heads import build_scorer
from raylign.models.loading import load_tokenizer
from raylign.records import Trajectory, collate
from raylign.training.critic import build_critic, score_states_of
from raylign.training.policy import Rates


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage of `jobs.reward_model`."""
    stage = tmp_path_factory.mktemp("reward_model")
    build_scorer(tiny_model, "score", seed=9).save_pretrained(stage / "model")
    load_tokenizer(tiny_model).save_pretrained(stage / "model")
    return stage


@pytest.fixture(scope="module")
def trajectories(tiny_model: Path) -> list[Trajectory]:
    return make_trajectories(tiny_model)


def test_a_value_is_a_function_of_the_tokens_before(reward_model: Path, tiny_model: Path) -> None:
    """As the reward model itself scores each beginning of the text."""
    critic = build_critic(reward_model, tiny_model, seed=0)
    tokens = torch.randint(4, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        values = score_states_of(critic, tokens, torch.tensor([7, 4]))
        assert values.shape == (2, 7) and values[0, 0] == 0 and values[1, 4:].eq(0).all()
        for row, length in ((0, 7), (1, 4)):
            for t in range(1, length):
                alone = critic(input_ids=tokens[row : row + 1, :t]).logits[0, 0]
                assert values[row, t] == pytest.approx(float(alone), abs=1e-5)


def test_a_new_head_says_nothing_yet(tiny_model: Path, trajectories: list[Trajectory]) -> None:
    """Its first advantages are what is still to come: here, of gamma = lambda = 1, the reward."""
    critic = build_critic(tiny_model, tiny_model, seed=0)
    assert score_states_of(critic, torch.tensor([[5, 6, 7]])).eq(0).all()
    learner = make_learner(tiny_model, "ppo", kl_coef=0.0, lam=1.0, whiten=False)
    advantages = learn(learner, trajectories).advantages
    rewards = {row: t.reward for row, t in enumerate(trajectories)}
    assert advantages == pytest.approx(rewards, abs=1e-6)


def test_it_is_told_how_much_each_token_counts(
    tiny_model: Path, trajectories: list[Trajectory]
) -> None:
    """Values of 0 and gamma = 1: what is to come, discounted by lambda for each token between."""
    learner = make_learner(tiny_model, "ppo", kl_coef=0.0, lam=0.5, whiten=False)
    shown = learn(learner, trajectories).token_advantages
    # The reward of the first one is 0, and so is all that its tokens have.
    assert shown.keys() == set(range(1, len(trajectories)))
    for row in shown:
        trajectory = trajectories[row]
        length = len(trajectory.token_ids)
        expected = [
            0.0 if t < 3 else trajectory.reward * 0.5 ** (length - 1 - t) for t in range(length)
        ]
        assert shown[row] == pytest.approx(expected, abs=1e-6)
    # Of an algorithm without a critic there is one number a completion, and it is told once.
    assert learn(make_learner(tiny_model, kl_coef=0.0), trajectories).token_advantages == {}


def test_another_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    build_scorer(tiny_model, "score", seed=9).save_pretrained(tmp_path)
    other = load_tokenizer(tiny_model)
    other.add_tokens(["new"])
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"critic\.model=.* has another tokenizer than the policy"):
        build_critic(tmp_path, tiny_model, seed=0)


def test_it_learns_what_returns_are(tiny_model: Path, trajectories: list[Trajectory]) -> None:
    learner = make_learner(tiny_model, "ppo", kl_coef=0.0, lam=1.0, value_clip=None)
    rates = Rates(lr=1e-6, critic_lr=3e-3)
    found = [learn(learner, trajectories, rates, passes=4).metrics for _ in range(6)]
    explained = [metrics["value/explained_variance"].mean for metrics in found]
    assert explained[0] == pytest.approx(0, abs=1e-6) and explained[-1] > 0.8
    assert found[-1]["value/loss"].mean < 0.2 * found[0]["value/loss"].mean


def test_a_clipped_value_does_not_go_far_in_one_update(
    tiny_model: Path, trajectories: list[Trajectory]
) -> None:
    means = {}
    for clip in (0.05, None):
        learner = make_learner(tiny_model, "ppo", kl_coef=0.0, value_clip=clip)
        rates = Rates(lr=1e-6, critic_lr=3e-3)
        metrics = learn(learner, trajectories, rates, passes=12).metrics
        assert (metrics["value/clip_fraction"].mean > 0.1) == (clip is not None)
        zeros = [0.0] * len(trajectories)
        batch = collate(trajectories, zeros, zeros, 0)
        assert learner.critic is not None
        values = learner.critic.score(batch)
        assert values is not None
        means[clip] = float(values[batch.loss_mask].abs().mean())
    assert means[0.05] < 0.5 * means[None]


def test_warming_up_the_critic_learns_alone(
    tiny_model: Path, trajectories: list[Trajectory]
) -> None:
    learner = make_learner(tiny_model, "ppo", warmup=1, sample=8)
    before = weights_of(learner)
    first = learn(learner, trajectories)
    assert all(torch.equal(before[name], t) for name, t in weights_of(learner).items())
    assert learner.version == 1 and "grad_norm" not in first.metrics
    assert first.metrics["kl"].mean == pytest.approx(0, abs=1e-6)
    assert first.mismatch_max < 1e-5 and first.metrics["mismatch/unchecked"].total == 0
    second = learn(learner, trajectories)
    assert "grad_norm" in second.metrics
    assert not all(torch.equal(before[name], t) for name, t in weights_of(learner).items())


def test_advantages_are_those_of_the_values_before_the_update(
    tiny_model: Path, reward_model: Path, trajectories: list[Trajectory]
) -> None:
    """Brute force: score, subtract the KL of a policy that has moved, and discount backwards."""
    learner = make_learner(tiny_model, "ppo", critic=reward_model, kl_coef=0.3, whiten=False)
    learn(learner, trajectories, Rates(lr=1e-2, critic_lr=1e-2))
    zeros = [0.0] * len(trajectories)
    batch = collate(trajectories, zeros, zeros, 0)
    assert learner.critic is not None
    values, old, reference = (
        function(batch)
        for function in (learner.critic.score, learner.scores.old, learner.scores.reference)
    )
    assert values is not None and old is not None and reference is not None
    earned = batch.rewards - 0.3 * (old - reference) * batch.loss_mask
    expected, _ = gae(earned, values, batch.loss_mask, 1.0, 0.95)
    found = learn(learner, trajectories, passes=2, minibatches=2, budget=40).advantages
    for row, advantages in enumerate(expected):
        mean = float(advantages[batch.loss_mask[row]].mean())
        assert found[row] == pytest.approx(mean, abs=1e-4)
