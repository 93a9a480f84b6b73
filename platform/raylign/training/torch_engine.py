"""Plain torch: one process, or replicas whose gradients are summed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from raylign.config import EngineConfig, OptimizerConfig
from raylign.models.loading import DTYPES
from raylign.training import passes
from raylign.training.engine import build_optimizer, require_finite
from raylign.training.sums import LossFunction, Measurement, Sums

STATE_FILE = "state.pt"


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
        self.device = next(model.parameters()).device
        self._clip = optimizer.clip
        masters = [p for p in model.parameters() if p.requires_grad]
        self._copies: list[nn.Parameter] = []
        if DTYPES[config.dtype] != torch.float32:
            kept = masters
            masters = [nn.Parameter(p.detach().float().clone()) for p in kept]
            model.to(DTYPES[config.dtype])
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
        for group in self._optimizer.param_groups:
            group["lr"] = lr
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

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.lm.named_parameters()}

    def save(self, directory: Path) -> None:
        if self.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            state = {"masters": self._masters, "optimizer": self._optimizer.state_dict()}
            torch.save(state, directory / STATE_FILE)
        self._wait()

    def load(self, directory: Path) -> None:
        self._wait()
        state = torch.load(directory / STATE_FILE, map_location=self.device, weights_only=True)
        with torch.no_grad():
            for master, saved in zip(self._masters, state["masters"], strict=True):
                master.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])
        self._refresh_copies()

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

    def _wait(self) -> None:
        if self.world_size > 1:
            dist.barrier()
