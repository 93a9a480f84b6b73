"""An update does not depend on how its batch was split; mismatch is told from staleness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raylign.algorithms.catalog import find_algorithm
from raylign.algorithms.policy import Coefficients
from raylign.config import EngineConfig, OptimizerConfig
from raylign.models.loading import load_model
from raylign.models.logprobs import score_tokens
from raylign.records import Batch, Trajectory, collate
from raylign.training.engine import build_engine
from raylign.training.policy import PolicyLearner

TORCH = EngineConfig(backend="torch")


def make_learner(model: Path, history: int = 1, kl_coef: float = 0.1) -> PolicyLearner:
    return PolicyLearner(
        build_engine(TORCH, load_model(model), OptimizerConfig(lr=1e-2, weight_decay=0.0)),
        load_model(model),
        find_algorithm("grpo"),
        Coefficients(kl_coef=kl_coef),
        temperature=1.0,
        history=history,
    )


def make_trajectories(model: Path, lengths: list[int]) -> list[Trajectory]:
    """Random tokens, prompt of three, behaviour log-probs of the model itself."""
    policy, stream = load_model(model), torch.Generator().manual_seed(3)
    made = []
    for index, length in enumerate(lengths):
        tokens = torch.randint(4, 50, (1, length), generator=stream)
        with torch.no_grad():
            logprobs = score_tokens(policy, tokens)[0][0].numpy()
        mask = np.arange(length) >= 3
        made.append(
            Trajectory(
                prompt_id=str(index // 2),
                group_id=str(index // 2),
                token_ids=tokens[0].numpy().astype(np.int32),
                loss_mask=mask,
                logprobs=np.where(mask, logprobs, 0.0).astype(np.float32),
                versions=np.where(mask, 0, -1).astype(np.int32),
                finish_reason="stop",
                text="",
                reward=float(index % 2),
            )
        )
    return made


def batch_of(trajectories: list[Trajectory], weights: list[float]) -> Batch:
    return collate(trajectories, [2.0 * (t.reward or 0.0) - 1.0 for t in trajectories], weights, 0)


LENGTHS = [12, 7, 9, 20, 5, 16]


@pytest.mark.parametrize("split", [[[0, 1, 2], [3, 4, 5]], [[5], [0, 3], [1], [2, 4]]])
@pytest.mark.parametrize("passes", [1, 2])
def test_any_split_gives_the_same_policy(
    tiny_model: Path, split: list[list[int]], passes: int
) -> None:
    trajectories = make_trajectories(tiny_model, LENGTHS)
    weights = [1.0 / len(LENGTHS) / t.sampled_tokens for t in trajectories]
    whole, pieces = make_learner(tiny_model), make_learner(tiny_model)
    expected = whole.update([batch_of(trajectories, weights)], 1e-3, passes)
    batches: list[Batch | None] = [
        batch_of([trajectories[i] for i in rows], [weights[i] for i in rows]) for rows in split
    ]
    found = pieces.update([*batches, None], 1e-3, passes)
    # Adam makes a step of up to 1e-3 of any gradient, and of the rounding in a small one too.
    for name, tensor in whole.weights.items():
        torch.testing.assert_close(pieces.weights[name], tensor, atol=5e-6, rtol=0)
    for name in ("loss", "kl", "entropy", "grad_norm"):
        assert found[name].mean == pytest.approx(expected[name].mean, abs=1e-5), name


def test_an_update_raises_what_was_rewarded(tiny_model: Path) -> None:
    trajectories = make_trajectories(tiny_model, LENGTHS)
    batch = batch_of(trajectories, [1 / 60] * len(LENGTHS))
    learner = make_learner(tiny_model, kl_coef=0.0)
    before = score_tokens(load_model(tiny_model), batch.tokens, batch.lengths)[0].detach()
    learner.update([batch], 1e-3, 1)
    after_model = load_model(tiny_model)
    with torch.no_grad():
        for name, parameter in after_model.named_parameters():
            parameter.copy_(learner.weights[name])
    after = score_tokens(after_model, batch.tokens, batch.lengths)[0].detach()
    gain = ((after - before) * batch.loss_mask).sum(1)
    rewarded = torch.tensor([t.reward == 1.0 for t in trajectories])
    assert gain[rewarded].mean() > 0 > gain[~rewarded].mean()


def test_mismatch_is_measured_at_the_version_that_sampled(tiny_model: Path) -> None:
    trajectories = make_trajectories(tiny_model, LENGTHS)
    batch = batch_of(trajectories, [1 / 60] * len(LENGTHS))
    learner = make_learner(tiny_model, history=1)
    learner.update([batch], 1e-2, 1)  # now at version 1; the samples are of version 0
    metrics, largest = learner.measure_mismatch(batch)
    assert metrics["mismatch/mean_abs"].mean < 1e-6 and largest < 1e-5
    assert metrics["mismatch/unchecked"].total == 0
    with torch.no_grad():
        current = learner.score_canary([tuple(trajectories[0].token_ids.tolist())])[0]
    stale = np.abs(current - trajectories[0].logprobs)[trajectories[0].loss_mask].mean()
    assert stale > 1e-3  # staleness alone is a thousand times larger
    learner.update([batch], 1e-2, 1)  # version 0 is forgotten
    metrics, _ = learner.measure_mismatch(batch)
    assert metrics["mismatch/unchecked"].total == batch.loss_tokens


def test_a_wrong_rollout_logprob_is_seen(tiny_model: Path) -> None:
    trajectories = make_trajectories(tiny_model, [10, 10])
    batch = batch_of(trajectories, [0.1, 0.1])
    batch.behaviour_logprobs[0, 5] += 0.25
    metrics, largest = make_learner(tiny_model).measure_mismatch(batch)
    assert largest == pytest.approx(0.25, abs=1e-4)
    assert metrics["mismatch/mean_abs"].mean == pytest.approx(0.25 / 14, abs=1e-4)
