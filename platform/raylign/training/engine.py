"""The protocol of what computes gradients and steps, and the factory of its two implementations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from raylign.config import EngineConfig, OptimizerConfig
from raylign.training.sums import LossFunction, Measurement, Sums


class DivergenceError(RuntimeError):
    """The gradient is not a finite number; no rank has taken the step."""


class Engine(Protocol):
    """A model that learns, on this rank and on its peers.

    Gradients are summed over backward calls and over ranks: a loss carries its own denominator,
    counted over all of them, and any split of a batch then gives the same update. Every rank must
    call `backward` equally often in a step; a rank with nothing to add gives a loss times zero.
    """

    module: nn.Module
    """Callable like the transformers model; what `score_tokens` takes."""
    lm: PreTrainedModel
    """The bare model, for configuration and sampling."""
    whole: bool
    """Whether every rank holds all of `lm`."""
    rank: int
    world_size: int
    data_rank: int
    """Which share of a step's rows this rank computes, of `data_ranks`; ranks that share a model
    between them have the same."""
    data_ranks: int
    device: torch.device

    def accumulate(self, batches: Sequence[Any], function: LossFunction) -> Sums:
        """Add the gradients of this rank's micro-batches (`Inputs`); what was measured, summed
        over them and not over ranks. Every rank must give equally many."""
        ...

    def measure(self, batches: Iterable[Any], function: Measurement) -> Sums:
        """The same without gradients, in evaluation mode."""
        ...

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the data ranks, each share of the rows counted once; the same on every rank."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a scalar that came from `module`."""
        ...

    def step(self, lr: float) -> float:
        """Sum gradients over ranks, clip, update, clear; the global norm before clipping.

        Raises `DivergenceError` on every rank, before anything is updated, when the norm is not a
        finite number.
        """
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights by Hugging Face name, whole on every rank, tied ones once. Collective.

        They may share memory with the model: copy what must outlive the next step.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write weights, optimizer state and step count. Collective."""
        ...

    def load(self, directory: Path) -> None:
        """Read what `save` wrote at the same world size; training goes on exactly. Collective."""
        ...


def build_engine(
    config: EngineConfig, model: PreTrainedModel, optimizer: OptimizerConfig
) -> Engine:
    """The engine that `config` names, owning `model`.

    `torch.distributed` must be initialised when there is more than one rank, and every rank must
    give the same weights.
    """
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if config.backend == "torch":
        from raylign.training.torch_engine import TorchEngine

        return TorchEngine(config, model, optimizer)
    from raylign.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(config, model, optimizer)


def require_finite(norm: float) -> None:
    """Raises `DivergenceError` unless a gradient's norm is a number; DeepSpeed says -1 for none."""
    if not math.isfinite(norm) or norm < 0:
        raise DivergenceError(f"the norm of the gradient is {norm}")


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) that decays matrices and leaves vectors alone."""
    trained = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
