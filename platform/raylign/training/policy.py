"""One rank's share of a policy update: log-probs, loss, gradients, step, and what it measured.

The rank does not know which algorithm it runs: advantages and loss weights arrive with the batch,
and the loss is a row of the catalog.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from raylign.algorithms.catalog import Algorithm
from raylign.algorithms.policy import Coefficients, PolicyInputs
from raylign.models.adapters import without_adapter
from raylign.models.logprobs import score_tokens
from raylign.records import Batch
from raylign.tracking import Metric, merge
from raylign.training.engine import Engine


class PolicyLearner:
    """Engine, frozen reference, and the last few versions of the policy.

    Past versions serve one purpose: to recompute rollout log-probs *at the version that sampled
    them*, so that a mismatch between rollout and learner is told from ordinary staleness.
    """

    def __init__(
        self,
        engine: Engine,
        reference: torch.nn.Module | None,
        algorithm: Algorithm,
        coefficients: Coefficients,
        *,
        temperature: float,
        history: int,
        scratch: torch.nn.Module | None = None,
    ) -> None:
        """`history` past versions are remembered besides the current one; -1 remembers none.

        Without a `reference` the engine's model is adapted, and the reference is that model with
        its adapter switched off; `scratch` is then a plain model of the same architecture, to put
        past versions into.
        """
        self._engine = engine
        self._reference = None if reference is None else self._freeze(reference)
        if history < 0:
            self._scratch = None
        elif scratch is not None:
            self._scratch = self._freeze(scratch)
        else:
            assert self._reference is not None, "without a reference, give a scratch model"
            self._scratch = copy.deepcopy(self._reference)
        self._algorithm, self._coefficients = algorithm, coefficients
        self._temperature = temperature
        self._past: deque[tuple[int, dict[str, torch.Tensor]]] = deque(maxlen=max(1, history + 1))
        self.weights: dict[str, torch.Tensor] = {}
        self.version = 0
        self._remember()

    def update(self, batches: Sequence[Batch | None], lr: float, passes: int) -> dict[str, Metric]:
        """`passes` optimizer steps on the same micro-batches; None stands for an empty one.

        With several passes the old policy is the one at the start, scored once; with one it is the
        current one, and no extra forward pass is made.
        """
        self._engine.module.train()
        batches = [None if batch is None else batch.to(self._engine.device) for batch in batches]
        old = [self._score_old(batch) for batch in batches] if passes > 1 else None
        reference = [self._score_reference(batch) for batch in batches]
        metrics: list[dict[str, Metric]] = []
        for _ in range(passes):
            for index, batch in enumerate(batches):
                before = old[index] if old is not None else None
                metrics.append(self._backward(batch, before, reference[index]))
            norm = self._engine.step(lr)
            share = 1.0 / self._engine.world_size  # every rank reports the same global norm
            metrics.append({"grad_norm": Metric(norm * share, share)})
        self.version += 1
        self._remember()
        return merge(metrics)

    def measure_mismatch(self, batch: Batch) -> tuple[dict[str, Metric], float]:
        """|rollout logprob - own logprob at the same version| over the sampled tokens of `batch`.

        Returns the mean as a metric and the largest. Tokens of versions no longer remembered are
        left out, and counted as `mismatch/unchecked`.
        """
        batch = batch.to(self._engine.device)
        total, count, largest = 0.0, 0, 0.0
        for version, weights in self._past:
            chosen = batch.loss_mask & (batch.versions == version)
            if bool(chosen.any()):
                own = self._score_past(weights, batch)
                gap = (own - batch.behaviour_logprobs)[chosen].abs()
                total, count = total + float(gap.sum()), count + gap.numel()
                largest = max(largest, float(gap.max()))
        unchecked = batch.loss_tokens - count
        metrics = {
            "mismatch/mean_abs": Metric(total, count),
            "mismatch/unchecked": Metric(unchecked, 1),
        }
        return metrics, largest

    @torch.no_grad()
    def score_canary(self, sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, ...]:
        """float32 [T] each: the current policy's log-probs at temperature 1. Collective."""
        scores = (score_tokens(self._engine.module, self._tensor(s)) for s in sequences)
        return tuple(logprobs[0].float().cpu().numpy() for logprobs, _ in scores)

    def _freeze(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.eval().requires_grad_(False).to(self._engine.device)

    def _tensor(self, sequence: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(sequence)], device=self._engine.device)

    def _remember(self) -> None:
        found = self._engine.weights(everywhere=self._scratch is not None)
        self.weights = {name: t.detach().cpu() for name, t in found.items()}
        if self._scratch is not None:
            copies = {name: t.clone() for name, t in self.weights.items()}
            self._past.append((self.version, copies))

    def _backward(
        self, batch: Batch | None, old: torch.Tensor | None, reference: torch.Tensor | None
    ) -> dict[str, Metric]:
        if batch is None:
            # Ranks must call backward equally often; this one adds nothing to the gradient.
            logprobs, _ = score_tokens(self._engine.module, self._tensor((0, 0)))
            self._engine.backward(logprobs.sum() * 0.0)
            return {}
        logprobs, entropy = score_tokens(
            self._engine.module, batch.tokens, batch.lengths, self._temperature
        )
        inputs = PolicyInputs(
            logprobs=logprobs,
            entropy=entropy,
            old_logprobs=logprobs.detach() if old is None else old,
            behaviour_logprobs=batch.behaviour_logprobs,
            reference_logprobs=reference,
            advantages=batch.advantages,
            weights=batch.weights,
        )
        loss, metrics = self._algorithm.loss(inputs, self._coefficients)
        self._engine.backward(loss)
        return {
            name: Metric(float(total), float(count)) for name, (total, count) in metrics.items()
        }

    @torch.no_grad()
    def _score_old(self, batch: Batch | None) -> torch.Tensor | None:
        return self._score_engine(batch)

    @torch.no_grad()
    def _score_reference(self, batch: Batch | None) -> torch.Tensor | None:
        if self._coefficients.kl_coef == 0:
            return None
        if self._reference is None:
            with without_adapter(self._engine.lm):
                return self._score_engine(batch)
        if batch is None:
            return None
        scores = score_tokens(self._reference, batch.tokens, batch.lengths, self._temperature)
        return scores[0]

    def _score_engine(self, batch: Batch | None) -> torch.Tensor | None:
        """Ranks that share the weights must call the model equally often, batch or none."""
        if batch is None:
            score_tokens(self._engine.module, self._tensor((0, 0)))
            return None
        return score_tokens(self._engine.module, batch.tokens, batch.lengths, self._temperature)[0]

    @torch.no_grad()
    def _score_past(self, weights: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Log-probs [B, T] under remembered weights, in a module kept for that."""
        assert self._scratch is not None
        own = dict(self._scratch.named_parameters())
        for name, tensor in weights.items():
            own[name].copy_(tensor)
        return score_tokens(self._scratch, batch.tokens, batch.lengths, self._temperature)[0]
