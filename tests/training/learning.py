"""Learners and trajectories of tiny models, for the tests of what learns from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylign.algorithms.catalog import find_algorithm, resolve_coefficients
from raylign.algorithms.online_preference import select_pairs
from raylign.config import AdapterConfig, EngineConfig, OptimizerConfig
from raylign.models.assembly import ModelPlan
from raylign.models.loading import load_model
from raylign.models.logprobs import score_tokens
from raylign.records import Trajectory
from raylign.training.critic import Critic, build_critic
from raylign.training.engine import build_engine
from raylign.training.minibatches import Cut, share_out
from raylign.training.policy import Learned, Method, PolicyLearner, Rates, Whole
from raylign.training.policy_scores import PolicyScores

TORCH = EngineConfig(backend="torch")
LENGTHS = [12, 7, 9, 20, 5, 16, 11, 8]
RATES = Rates(lr=1e-3, critic_lr=1e-3)


def make_learner(
    model: Path,
    algorithm: str = "grpo",
    *,
    engine: EngineConfig = TORCH,
    history: int = 0,
    warmup: int = 0,
    sample: int = 0,
    peft: Any = "none",
    critic: Path | None = None,
    **given: Any,
) -> PolicyLearner:
    row = find_algorithm(algorithm)
    optimizer = OptimizerConfig(lr=1e-2, weight_decay=0.0)
    adapter = AdapterConfig() if peft == "none" else AdapterConfig(rank=4)
    lm = ModelPlan(model, 4, peft=peft, adapter=adapter).build()
    policy = build_engine(engine, lm, optimizer)
    values = None
    if row.needs_values:
        values = Critic(
            build_engine(engine, build_critic(critic or model, model, 5), optimizer), warmup
        )
    plain = load_model(model)
    adapted = peft != "none"
    scores = PolicyScores(
        policy,
        None if adapted else plain,
        plain if adapted else None,
        temperature=1.0,
        history=history,
    )
    method = Method(row, resolve_coefficients(row, given), max_tokens=24, sample=sample)
    return PolicyLearner(policy, method, scores, values)


def make_trajectories(model: Path, lengths: Sequence[int] = LENGTHS) -> list[Trajectory]:
    """Random tokens, prompt of three, two completions a group, behaviour log-probs of the model
    itself at version 0."""
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
                reward=float(index % 2) + 0.125 * index,
            )
        )
    return made


def learn(
    learner: PolicyLearner,
    trajectories: Sequence[Trajectory],
    rates: Rates = RATES,
    *,
    rank: int = 0,
    ranks: int = 1,
    budget: int = 10_000,
    passes: int = 1,
    minibatches: int = 1,
) -> Learned:
    """One update on this rank's share of the batch."""
    groups = [int(t.group_id) for t in trajectories]
    rewards = [t.reward or 0.0 for t in trajectories]
    pairs = None
    if learner.method.algorithm.pairwise:
        pairs = select_pairs(torch.tensor(rewards), torch.tensor(groups)).tolist()
    cut = Cut(ranks, budget, passes, minibatches, seed=11)
    lengths = [len(t.token_ids) for t in trajectories]
    share = share_out(lengths, groups, cut, learner.version, pairs)[rank]
    whole = Whole(tuple(rewards), tuple(groups), tuple(t.sampled_tokens for t in trajectories))
    return learner.update([trajectories[row] for row in share.rows], share, whole, rates)


def shift_reward(trajectories: Sequence[Trajectory], amount: float) -> list[Trajectory]:
    return [replace(t, reward=(t.reward or 0.0) + amount) for t in trajectories]


def weights_of(learner: PolicyLearner) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in learner.engine.weights().items()}
