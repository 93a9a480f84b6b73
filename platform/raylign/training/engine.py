"""The protocol of what computes gradients and steps, and the factory of its two implementations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from raylign.config import EngineConfig, OptimizerConfig
from raylign.models.acceleration import accelerate, compile_layers
from raylign.training.fragments import Fragment, StoredState
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

    def weights(self, everywhere: bool = False) -> dict[str, torch.Tensor]:
        """All weights by Hugging Face name, whole, tied ones once, as a plain model has them:
        adapters folded in, quantised ones dequantised. Collective.

        Weights that are shared out over ranks are put together one at a time, on the CPU, and for
        the first rank alone, unless they are wanted `everywhere`. Others share memory with the
        model: copy what must outlive the next step.
        """
        ...

    def exportable(self) -> dict[str, torch.Tensor]:
        """What `export_model` writes on the first rank: `weights`, but of an adapted model the
        trained ones, by their name in `lm`. Collective; where and in whose memory as `weights`."""
        ...

    def fragments(self) -> list[Fragment]:
        """The trained weights and optimizer state that this rank owns; nothing is gathered. Over
        all ranks they cover every trained weight. They share memory with the engine."""
        ...

    def restore(self, stored: StoredState) -> None:
        """Go on from what engines have given as `fragments`, of whatever kind and however many
        ranks: to the bit where they were the same. Collective."""
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
    if config.compile:
        compile_layers(model)
    else:
        accelerate(model)
    model.train()
    if config.pipeline_parallel > 1:
        from raylign.training.pipeline_engine import PipelineEngine

        return PipelineEngine(config, model, optimizer)
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
    """AdamW (Loshchilov and Hutter, 2019) that decays matrices and leaves vectors alone.

    A parameter's attribute `lr_scale`, 1 where there is none, multiplies its learning rate.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for p in parameters:
        if p.requires_grad:
            groups.setdefault((p.ndim < 2, getattr(p, "lr_scale", 1.0)), []).append(p)
    return torch.optim.AdamW(
        [
            {
                "params": groups[vectors, scale],
                "weight_decay": 0.0 if vectors else config.weight_decay,
                "lr": config.lr * scale,
                "lr_scale": scale,
            }
            for vectors, scale in sorted(groups)
        ],
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Give an optimizer's groups the learning rate of a step."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
