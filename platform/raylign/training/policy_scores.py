"""Log-probs of a batch under every policy that a step asks for: the current one, its reference, and
the versions before it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from raylign.models.acceleration import accelerate
from raylign.models.adapters import find_adaptation, without_adapter
from raylign.models.logprobs import score_tokens
from raylign.records import Batch
from raylign.training.engine import Engine


class PolicyScores:
    """The engine's policy, a frozen reference, and the last few versions.

    Past versions serve one purpose: to recompute rollout log-probs *at the version that sampled
    them*, so that a mismatch between rollout and learner is told from ordinary staleness.
    """

    def __init__(
        self,
        engine: Engine,
        reference: torch.nn.Module | None,
        scratch: torch.nn.Module | None,
        *,
        temperature: float,
        history: int,
    ) -> None:
        """`history` versions before the current one are remembered.

        Without a `reference`, that is the engine's own model with its adapter switched off.
        `scratch` is a plain model of the same architecture to put past versions into; a copy of the
        reference when not given.
        """
        self._engine, self._temperature = engine, temperature
        self._reference = None if reference is None else self._freeze(reference)
        self._scratch: torch.nn.Module | None = None
        if history > 0:
            model = copy.deepcopy(reference) if scratch is None else scratch
            assert model is not None, "without a reference, give a scratch model"
            self._scratch = self._freeze(model)
        self._past: deque[tuple[int, dict[str, torch.Tensor]]] = deque(maxlen=history)

    def remember(self, version: int) -> None:
        """Keep the current weights, which are those of `version`, before they change. Collective
        unless nothing is remembered."""
        if self._scratch is not None:
            found = self._engine.weights(everywhere=True)
            self._past.append((version, {n: t.detach().cpu().clone() for n, t in found.items()}))

    def forget(self) -> None:
        """Drop past versions: what comes now goes on from another one."""
        self._past.clear()

    def own(self, batch: Batch | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Log-probs and entropies [B, T] of the current policy, with gradient where that is wanted.

        Ranks that share the weights must call equally often, batch or none.
        """
        if batch is None:
            score_tokens(self._engine.module, self._tensor((0, 0)))
            return None
        return score_tokens(self._engine.module, batch.tokens, batch.lengths, self._temperature)

    @torch.no_grad()
    def old(self, batch: Batch | None) -> torch.Tensor | None:
        """Log-probs [B, T] of the current policy, as constants."""
        found = self.own(batch)
        return None if found is None else found[0]

    @torch.no_grad()
    def reference(self, batch: Batch | None) -> torch.Tensor | None:
        """Log-probs [B, T] of the reference. Raises `ValueError` when there is none."""
        if self._reference is None:
            if find_adaptation(self._engine.lm) is None:
                raise ValueError("this step needs a reference policy, and none was loaded")
            with without_adapter(self._engine.lm):
                return self.old(batch)
        if batch is None:
            return None
        return score_tokens(self._reference, batch.tokens, batch.lengths, self._temperature)[0]

    @torch.no_grad()
    def past(self, batch: Batch, version: int) -> torch.Tensor | None:
        """Log-probs [B, T] of a version before the current one; None when it is forgotten. This
        rank's own affair."""
        weights = dict(self._past).get(version)
        if weights is None:
            return None
        assert self._scratch is not None
        own = dict(self._scratch.named_parameters())
        for name, tensor in weights.items():
            own[name].copy_(tensor)
        return score_tokens(self._scratch, batch.tokens, batch.lengths, self._temperature)[0]

    @torch.no_grad()
    def canary(self, sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, ...]:
        """float32 [T] each: the current policy's log-probs at temperature 1. Collective."""
        scores = (score_tokens(self._engine.module, self._tensor(s)) for s in sequences)
        return tuple(logprobs[0].float().cpu().numpy() for logprobs, _ in scores)

    def backward_nothing(self) -> None:
        """What a rank does in place of a backward pass when it has nothing to add."""
        logprobs, _ = score_tokens(self._engine.module, self._tensor((0, 0)))
        self._engine.backward(logprobs.sum() * 0.0)

    def _freeze(self, model: torch.nn.Module) -> torch.nn.Module:
        accelerate(model)  # as the policy is: equal weights have equal log-probs, to the bit
        return model.eval().requires_grad_(False).to(self._engine.device)

    def _tensor(self, sequence: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(sequence)], device=self._engine.device)
