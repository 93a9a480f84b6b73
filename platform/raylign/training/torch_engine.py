"""Plain torch: one process, or replicas whose gradients are summed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from raylign.config import EngineConfig, OptimizerConfig
from raylign.models.adapters import find_adaptation
from raylign.models.folding import plain_weights, trained_weights
from raylign.models.loading import DTYPES
from raylign.models.precision import narrow
from raylign.training import passes
from raylign.training.engine import build_optimizer, require_finite, set_rate
from raylign.training.fragments import Fragment, StoredState, fill_shards, list_whole, read_shards
from raylign.training.sums import LossFunction, Measurement, Sums


class TorchEngine:
    """Every rank holds everything. Bfloat16 weights keep float32 masters and gradients."""

    def __init__(
        self, config: EngineConfig, model: PreTrainedModel, optimizer: OptimizerConfig
    ) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.data_rank, self.data_ranks = self.rank, self.world_size
        self.module: nn.Module = model
        self.lm, self.whole = model, True
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(self.device)
        self._clip = optimizer.clip
        masters = [p for p in model.parameters() if p.requires_grad]
        self._copies: list[nn.Parameter] = []
        if DTYPES[config.dtype] != torch.float32:
            kept = masters
            masters = [_copy_master(p) for p in kept]
            narrow(model, DTYPES[config.dtype])
            self._copies = kept
        self._masters = masters
        self._optimizer = build_optimizer(masters, optimizer)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        for master, copy in zip(self._masters, self._copies, strict=False):
            if copy.grad is not None:
                gradient = copy.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                copy.grad = None

    def step(self, lr: float) -> float:
        if self.world_size > 1:
            self._sum_over_ranks()
        norm = nn.utils.clip_grad_norm_(self._masters, self._clip)
        require_finite(float(norm))
        set_rate(self._optimizer.param_groups, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._refresh_copies()
        return float(norm)

    def accumulate(self, batches: Sequence[Any], function: LossFunction) -> Sums:
        return passes.accumulate(self, batches, function)

    def measure(self, batches: Iterable[Any], function: Measurement) -> Sums:
        return passes.measure(self, batches, function)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def weights(self, everywhere: bool = False) -> dict[str, torch.Tensor]:
        return plain_weights(self.lm)

    def exportable(self) -> dict[str, torch.Tensor]:
        return trained_weights(self.lm) if find_adaptation(self.lm) else self.weights()

    def fragments(self) -> list[Fragment]:
        if self.rank > 0:
            return []
        return read_shards(list_whole(self._named_masters()), self._optimizer.state)

    def restore(self, stored: StoredState) -> None:
        fill_shards(list_whole(self._named_masters()), self._optimizer, stored)
        self._refresh_copies()

    def _named_masters(self) -> dict[str, torch.Tensor]:
        names = (name for name, p in self.lm.named_parameters() if p.requires_grad)
        return dict(zip(names, self._masters, strict=True))

    def _sum_over_ranks(self) -> None:
        for p in self._masters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self._masters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def _refresh_copies(self) -> None:
        for master, copy in zip(self._masters, self._copies, strict=False):
            copy.copy_(master)


def _copy_master(parameter: nn.Parameter) -> nn.Parameter:
    master = nn.Parameter(parameter.detach().float().clone())
    vars(master).update(vars(parameter))  # `lr_scale`
    return master
