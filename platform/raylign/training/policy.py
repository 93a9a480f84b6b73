"""One rank's share of a policy update: scores, credit, gradients, steps, and what it measured.

The rank knows the algorithm as a row of the catalog and nothing else of it. Advantages are made on
the ranks, where reference log-probs and values are; what they need of other ranks' rows are sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from raylign.algorithms.catalog import Algorithm, needs_reference
from raylign.algorithms.credit import (
    apply_whitening,
    assign_credit,
    penalise_tokens,
    whiten_moments,
)
from raylign.algorithms.kl import k3
from raylign.algorithms.masked import masked_sum, sequence_sums
from raylign.algorithms.online_preference import pair_numbers
from raylign.algorithms.policy import Coefficients, PolicyInputs
from raylign.algorithms.values import explained_variance, value_loss
from raylign.algorithms.weighting import Weighting, token_weights
from raylign.records import Batch, Trajectory, collate
from raylign.tracking import Metric, merge
from raylign.training.critic import Critic, silence_dropout
from raylign.training.engine import DivergenceError, Engine
from raylign.training.minibatches import Share
from raylign.training.mismatch import find_current_gaps, find_past_gaps, measure_gaps
from raylign.training.policy_scores import PolicyScores

SHOWN_ROWS = 16
"""Of a batch, of which it is told how much each token counts; more where more are compared."""


@dataclass(frozen=True, slots=True)
class Method:
    """How a policy learns."""

    algorithm: Algorithm
    coefficients: Coefficients
    temperature: float = 1.0
    """That completions are sampled at."""
    max_tokens: int = 1
    """Longest completion; for algorithms of `constant` weighting."""
    sample: int = 0
    """First so many rows of a batch whose log-probs are compared with the rollout workers'."""


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """What every rank is told of all B rows of a batch."""

    rewards: tuple[float, ...]
    groups: tuple[int, ...]
    lengths: tuple[int, ...]
    """Sampled tokens."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Numbers that hold for one step."""

    lr: float
    critic_lr: float = 0.0
    kl_coef: float | None = None
    """The algorithm's own when not given."""


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """What an update measured on a rank."""

    metrics: dict[str, Metric]
    advantages: dict[int, float]
    """Mean over the trained tokens of each own row, by its number in the batch."""
    gaps: dict[int, np.ndarray]
    """float32 [T] of sampled rows: learner's minus rollout worker's log-prob at the version that
    sampled the token; NaN where that is not known."""
    token_advantages: dict[int, np.ndarray]
    """float32 [T] of the first rows of the batch, where they are not the same on every trained
    token; 0 on others."""

    @property
    def mismatch_max(self) -> float:
        """Largest gap, without its sign."""
        return max(
            (float(np.nanmax(np.abs(g), initial=0)) for g in self.gaps.values()), default=0.0
        )


class Divergence(DivergenceError):
    """The gradient of an optimizer step is no number; that step was taken by no rank."""

    def __init__(self, reason: str, rows: tuple[int, ...]) -> None:
        """rows: of the batch, that the step was made of."""
        super().__init__(reason, rows)
        self.reason, self.rows = reason, rows

    def __str__(self) -> str:
        return self.reason


class PolicyLearner:
    """A policy in its engine, and what is needed to judge it."""

    def __init__(
        self,
        engine: Engine,
        method: Method,
        scores: PolicyScores,
        critic: Critic | None = None,
        pad: int = 0,
    ) -> None:
        assert method.algorithm.needs_values == (critic is not None), "a critic where it is needed"
        silence_dropout(engine.lm)
        engine.module.train()
        self.engine, self.critic, self.scores = engine, critic, scores
        self.method, self._pad = method, pad
        self.version = 0

    def update(
        self, trajectories: Sequence[Trajectory], share: Share, whole: Whole, rates: Rates
    ) -> Learned:
        """Learn from a batch of which this rank holds `trajectories`, the rows of its `share`.

        The old policy is the one before the first optimizer step. Raises `Divergence` on every
        rank; steps before that one have been taken, and the learner must be restored.
        """
        step = _Step(self, trajectories, share, whole, rates)
        step.prepare()
        self.scores.remember(self.version)
        metrics = merge(step.learn())
        gaps = step.compare()
        metrics |= measure_gaps(gaps, trajectories, share.rows)
        learned = Learned(
            metrics | step.measured, step.list_advantages(), gaps, step.show_advantages()
        )
        self.version += 1
        return learned

    def restore(self, version: int) -> None:
        """The engines have been given the state of `version`."""
        self.version = version
        self.scores.forget()


class _Step:
    """One update in the making."""

    def __init__(
        self,
        learner: PolicyLearner,
        trajectories: Sequence[Trajectory],
        share: Share,
        whole: Whole,
        rates: Rates,
    ) -> None:
        method, self._engine = learner.method, learner.engine
        self._version, self._scores = learner.version, learner.scores
        self._critic, self._method = learner.critic, method
        self._algorithm = method.algorithm
        self._coefficients = method.coefficients
        if rates.kl_coef is not None:
            self._coefficients = replace(method.coefficients, kl_coef=rates.kl_coef)
        self._share, self._rates, self._whole = share, rates, whole
        device = self._engine.device
        nothing = [0.0] * len(trajectories)
        self._batch = (
            collate(trajectories, nothing, nothing, learner._pad) if trajectories else _blank()
        ).to(device)
        self._trajectories = trajectories
        self._local = {row: index for index, row in enumerate(share.rows)}
        self._rewards = torch.tensor(whole.rewards, dtype=torch.float32, device=device)
        self._groups = torch.tensor(whole.groups, dtype=torch.int64, device=device)
        self._rows = torch.tensor(share.rows, dtype=torch.int64, device=device)
        self._pairs: torch.Tensor | None = None
        if self._algorithm.pairwise:
            self._pairs = pair_numbers(self._rewards.cpu(), self._groups.cpu())[self._rows.cpu()]
        self._warming = self._critic is not None and learner.version < self._critic.warmup
        self.measured: dict[str, Metric] = {}

    def prepare(self) -> None:
        """Everything that is computed before the first optimizer step."""
        coefficients, share = self._coefficients, self._share
        in_reward = coefficients.kl_coef != 0 and coefficients.kl_in == "reward"
        referred = needs_reference(self._algorithm, coefficients)
        old = reference = values = None
        if in_reward or len(share.updates) > 1 or self._warming:
            old = self._fill(self._scores.old)
        if referred:
            reference = self._fill(self._scores.reference)
        if self._critic is not None:
            values = self._fill(self._critic.score)
        self._batch = replace(
            self._batch, old_logprobs=old, reference_logprobs=reference, values=values
        )
        self._assign()
        sampled = [
            [self._local[r] for r in rows if r < self._method.sample] for rows in share.scoring
        ]
        self._past_gaps = find_past_gaps(
            self._batch, [rows for rows in sampled if rows], self._scores, self._version
        )
        if self._warming and old is not None and reference is not None:
            total = masked_sum(k3(old, reference), self._batch.loss_mask)
            self.measured["kl"] = Metric(float(total), float(self._batch.loss_tokens))

    def learn(self) -> Iterator[dict[str, Metric]]:
        """The optimizer steps, and what each measured."""
        for micro_batches, members in zip(self._share.updates, self._share.members, strict=True):
            if not self._warming:
                yield from self._step_policy(micro_batches, members)
            if self._critic is not None:
                yield from self._step_critic(self._critic, micro_batches, members)

    def compare(self) -> dict[int, np.ndarray]:
        """The gaps of sampled rows; see `Learned`."""
        current = find_current_gaps(self._batch, self._version)
        gaps = torch.where(current.isnan(), self._past_gaps, current)
        return {
            row: gaps[index, : len(self._trajectories[index].token_ids)].cpu().numpy()
            for row, index in self._local.items()
            if row < self._method.sample
        }

    def list_advantages(self) -> dict[int, float]:
        """Mean over each row's trained tokens, by the row's number."""
        batch = self._batch
        sums = sequence_sums(batch.advantages, batch.loss_mask).tolist()
        tokens = batch.loss_mask.sum(1).tolist()
        return {
            row: total / count if count else 0.0
            for row, total, count in zip(self._share.rows, sums, tokens, strict=True)
        }

    def show_advantages(self) -> dict[int, np.ndarray]:
        """Of each token, in rows to be looked at; see `Learned`."""
        shown = {}
        for row, index in self._local.items():
            trained = self._batch.advantages[index][self._batch.loss_mask[index]]
            if row < max(self._method.sample, SHOWN_ROWS) and len(trained.unique()) > 1:
                length = len(self._trajectories[index].token_ids)
                shown[row] = self._batch.advantages[index, :length].cpu().numpy()
        return shown

    def _fill(self, score: Callable[[Batch | None], torch.Tensor | None]) -> torch.Tensor:
        """[b, T] of all own rows, a micro-batch at a time; every rank as often."""
        filled = torch.zeros_like(self._batch.behaviour_logprobs)
        for rows in self._share.scoring:
            chosen = [self._local[row] for row in rows]
            found = score(self._batch.select(chosen) if chosen else None)
            if found is not None and chosen:
                filled[torch.tensor(chosen, device=filled.device), : found.shape[1]] = found
        return filled

    def _assign(self) -> None:
        """Advantages and returns of the own rows."""
        batch, coefficients = self._batch, self._coefficients
        mask, kl, kl_sums = batch.loss_mask, None, None
        if coefficients.kl_coef != 0 and coefficients.kl_in == "reward":
            assert batch.old_logprobs is not None and batch.reference_logprobs is not None
            kl = penalise_tokens(batch.old_logprobs, batch.reference_logprobs, mask, coefficients)
            sums = torch.zeros(len(self._rewards), dtype=torch.float64, device=mask.device)
            sums[self._rows] = sequence_sums(kl, mask).double()
            kl_sums = self._engine.sum(sums).to(self._rewards.dtype)
        advantages, returns = assign_credit(
            self._algorithm,
            coefficients,
            self._rewards,
            self._groups,
            mask,
            self._rows,
            kl=kl,
            values=batch.values,
            kl_sums=kl_sums,
        )
        if coefficients.whiten:
            moments = self._engine.sum(whiten_moments(advantages, mask))
            advantages = apply_whitening(advantages, mask, moments)
        self._batch = replace(batch, advantages=advantages.float(), returns=returns)
        if batch.values is not None and returns is not None:
            self._explain(batch.values, returns, mask)

    def _explain(self, values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> None:
        """How much of the returns the critic knew."""
        _, found = value_loss(values, values, returns, mask.float(), None)
        pairs = torch.stack([torch.stack([t.double(), n.double()]) for t, n in found.values()])
        totals = self._engine.sum(pairs)
        means = {
            name: total / count if count else 0.0
            for name, (total, count) in zip(found, totals.tolist(), strict=True)
        }
        self.measured["value/explained_variance"] = self._same(explained_variance(means))

    def _same(self, value: float) -> Metric:
        """A number that every rank reports, to be counted once."""
        share = 1.0 / self._engine.world_size
        return Metric(value * share, share)

    def _weigh(self, members: Sequence[int], weighting: Weighting) -> Batch:
        """The own rows with weights that sum to 1 over all ranks' members of an optimizer step."""
        lengths = [self._whole.lengths[row] for row in members]
        total = sum(lengths) if weighting == "tokens" else sum(n > 0 for n in lengths)
        weights = token_weights(
            self._batch.loss_mask, weighting, max_tokens=self._method.max_tokens, total=float(total)
        )
        return replace(self._batch, weights=weights)

    def _step_policy(
        self, micro_batches: Sequence[Sequence[int]], members: tuple[int, ...]
    ) -> Iterator[dict[str, Metric]]:
        weighed = self._weigh(members, self._algorithm.weighting)
        for rows in micro_batches:
            chosen = [self._local[row] for row in rows]
            yield self._backward(weighed.select(chosen) if chosen else None, chosen)
        yield {"grad_norm": self._take("policy", self._engine, self._rates.lr, members)}

    def _step_critic(
        self, critic: Critic, micro_batches: Sequence[Sequence[int]], members: tuple[int, ...]
    ) -> Iterator[dict[str, Metric]]:
        weighed = self._weigh(members, "tokens")
        for rows in micro_batches:
            chosen = [self._local[row] for row in rows]
            yield critic.backward(weighed.select(chosen) if chosen else None, self._coefficients)
        norm = self._take("critic", critic.engine, self._rates.critic_lr, members)
        yield {"value/grad_norm": norm}

    def _take(self, who: str, engine: Engine, lr: float, members: tuple[int, ...]) -> Metric:
        try:
            return self._same(engine.step(lr))
        except DivergenceError as error:
            reason = f"{who} at version {self._version}: {error}"
            raise Divergence(reason, members) from None

    def _backward(self, batch: Batch | None, chosen: Sequence[int]) -> dict[str, Metric]:
        if batch is None:
            self._scores.backward_nothing()
            return {}
        found = self._scores.own(batch)
        assert found is not None
        logprobs, entropy = found
        if batch.old_logprobs is None and self._method.sample:
            self._keep_old(logprobs.detach(), chosen)
        inputs = PolicyInputs(
            logprobs=logprobs,
            entropy=entropy,
            old_logprobs=logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs,
            behaviour_logprobs=batch.behaviour_logprobs,
            reference_logprobs=batch.reference_logprobs,
            advantages=batch.advantages,
            weights=batch.weights,
            pairs=None if self._pairs is None else self._pairs[list(chosen)].to(logprobs.device),
        )
        loss, metrics = self._algorithm.loss(inputs, self._coefficients)
        self._engine.backward(loss)
        return {
            name: Metric(float(total), float(count)) for name, (total, count) in metrics.items()
        }

    def _keep_old(self, logprobs: torch.Tensor, chosen: Sequence[int]) -> None:
        """With one optimizer step its own forward pass is that of the old policy."""
        if self._batch.old_logprobs is None:
            empty = torch.zeros_like(self._batch.behaviour_logprobs)
            self._batch = replace(self._batch, old_logprobs=empty)
        assert self._batch.old_logprobs is not None
        rows = torch.tensor(list(chosen), device=logprobs.device)
        self._batch.old_logprobs[rows, : logprobs.shape[1]] = logprobs


def _blank() -> Batch:
    """The batch of a rank without rows."""
    empty = torch.zeros((0, 1))
    return Batch(
        tokens=empty.long(),
        lengths=torch.zeros(0, dtype=torch.int64),
        loss_mask=empty.bool(),
        behaviour_logprobs=empty,
        versions=empty.int(),
        advantages=empty,
        weights=empty,
        rewards=empty,
    )
