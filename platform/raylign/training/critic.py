"""The value function of algorithms that have one: a decoder under a head, read at every token.

Entry t of its values belongs to the state in which token t was chosen, the tokens before it, as
log-probs do. It is a transformers model like a reward model, and may begin as one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from raylign.algorithms.policy import Coefficients
from raylign.algorithms.values import value_loss
from raylign.config import UserError
from raylign.models.enclosure import embed_context, run_inside
from raylign.models.heads import build_scorer, is_scorer, score_states
from raylign.models.loading import load_tokenizer
from raylign.records import Batch
from raylign.tracking import Metric
from raylign.training.engine import Engine

# What explained variance is made of: of no interest by itself.
_MOMENTS = ("value/error", "value/error_square", "value/return_square")


def locate_critic(start: Path, policy: Path) -> Path:
    """Where in `start` the model is that a critic begins with. Raises `UserError` when there is
    none, or it has another tokenizer than the `policy`."""
    if not start.is_dir():
        raise UserError(f"align.critic.model={start}: no such directory")
    path = start / "model" if (start / "model").is_dir() else start
    if path != policy:
        ours, theirs = (load_tokenizer(where).get_vocab() for where in (policy, path))
        if ours != theirs:
            raise UserError(
                f"align.critic.model={start} has another tokenizer than the policy {policy}; train "
                "the reward model from the policy's own family, or leave align.critic.model out"
            )
    return path


def build_critic(start: Path, policy: Path, seed: int) -> PreTrainedModel:
    """The model of a critic on the CPU, from a directory or stage with a reward model or any other
    model. A head that is new says 0 of every state: its first advantages are the rewards to come.

    Raises `UserError` when it cannot be loaded, or has another tokenizer than the `policy`.
    """
    path = locate_critic(start, policy)
    scorer = build_scorer(path, "score", seed)
    if not is_scorer(path, "score"):
        decoder = {id(p) for p in scorer.get_decoder().parameters()}
        with torch.no_grad():
            for parameter in scorer.parameters():
                if id(parameter) not in decoder:
                    parameter.zero_()
    return scorer


def score_states_of(
    module: nn.Module, tokens: torch.Tensor, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Values float32 [B, T] of right-padded rows, differentiable; 0 in column 0 and in padding.

    tokens: int64 [B, T]; lengths: int64 [B], all T when None.
    """
    return run_inside(module, _score, tokens, lengths)


def _score(lm: PreTrainedModel, tokens: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    hidden = embed_context(lm, tokens)[:, :-1]
    values = score_states(lm, hidden.flatten(0, 1)).view(hidden.shape[:2])
    if lengths is not None:
        real = torch.arange(1, tokens.shape[1], device=tokens.device) < lengths[:, None]
        values = torch.where(real, values, 0.0)
    return nn.functional.pad(values, (1, 0))


class Critic:
    """A value function in an engine of its own. Ranks must call every method equally often."""

    def __init__(self, engine: Engine, warmup: int = 0) -> None:
        """warmup: first versions of the policy during which the critic alone learns."""
        self.engine, self.warmup = engine, warmup
        silence_dropout(engine.lm)

    @torch.no_grad()
    def score(self, batch: Batch | None) -> torch.Tensor | None:
        """Values [B, T] as they are now; None for no batch."""
        if batch is None:
            score_states_of(self.engine.module, self._nothing())
            return None
        return score_states_of(self.engine.module, batch.tokens, batch.lengths)

    def backward(self, batch: Batch | None, coefficients: Coefficients) -> dict[str, Metric]:
        """Add the gradient of a micro-batch that has `values` and `returns`."""
        if batch is None:
            values = score_states_of(self.engine.module, self._nothing())
            self.engine.backward(values.sum() * 0.0)
            return {}
        assert batch.values is not None and batch.returns is not None
        values = score_states_of(self.engine.module, batch.tokens, batch.lengths)
        loss, metrics = value_loss(
            values, batch.values, batch.returns, batch.weights, coefficients.value_clip
        )
        self.engine.backward(coefficients.value_coef * loss)
        return {
            name: Metric(float(total), float(count))
            for name, (total, count) in metrics.items()
            if name not in _MOMENTS
        }

    def _nothing(self) -> torch.Tensor:
        return torch.zeros((1, 2), dtype=torch.int64, device=self.engine.device)


def silence_dropout(lm: nn.Module) -> None:
    """Whoever samples has no dropout: with it, another policy would be trained, and a token's ratio
    to its old self would be noise."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
