"""Layers on several ranks: a pipeline of stages, and replicas of it that share the rows.

Why not DeepSpeed's own pipeline, which does run on gloo (0.19.8, torch 2.13)? It applies a step
whose gradient is not a number and reports no norm; its loss is fixed when it is built, gets one
output and the labels, and is averaged; masks and positions would travel through every stage as
part of the hidden states; and a model must be listed anew as `LayerSpec`s, under other names.
`torch.distributed.pipelining` wants micro-batches of one shape, and at least as many as stages.
Here any objective runs on any micro-batches: each rank reads the rows itself and only hidden states
travel, so the shape of what comes next is known without being sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from raylign.config import EngineConfig, OptimizerConfig, UserError
from raylign.models.adapters import find_adaptation
from raylign.models.folding import plain_weights, trained_weights
from raylign.models.loading import DTYPES
from raylign.models.precision import narrow
from raylign.runtime import derive_seed
from raylign.training.engine import build_optimizer, require_finite, set_rate
from raylign.training.fragments import Fragment, StoredState, fill_shards, list_whole, read_shards
from raylign.training.pipeline_link import Link, Shape
from raylign.training.pipeline_schedule import run_forward_backward
from raylign.training.pipeline_stage import Stage
from raylign.training.sums import LossFunction, Measurement, Sums, add
from raylign.training.topology import arrange

BUCKET = 2**24
"""Numbers that are sent at once between replicas."""


class PipelineEngine:
    """Every rank holds some layers. Bfloat16 weights keep float32 masters and gradients.

    With `zero_stage` 1 the replicas of a stage share out its masters and optimizer state, whole
    tensors each.
    """

    def __init__(
        self, config: EngineConfig, model: PreTrainedModel, optimizer: OptimizerConfig
    ) -> None:
        """Raises `UserError` when the model cannot be cut into so many stages."""
        if config.offload != "none":
            raise UserError(
                f"engine.offload={config.offload} cannot be combined with "
                f"engine.pipeline_parallel={config.pipeline_parallel}; set it to none"
            )
        world = dist.get_world_size() if dist.is_initialized() else 1
        topology = arrange(config, world)
        self.rank, self.world_size = dist.get_rank(), world
        self.data_rank, self.data_ranks = topology.place(self.rank, "data"), topology.data
        nccl = dist.get_backend() == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else model.device
        index = topology.place(self.rank, "pipeline")
        self._stage = Stage(model, index, topology.pipeline)
        self.module: nn.Module = self._stage
        self.lm, self.whole = model, False
        self._clip, self._dtype = optimizer.clip, DTYPES[config.dtype]
        self._chain = _find_group(topology.groups("pipeline"), self.rank)
        self._peers = _find_group(topology.groups("data"), self.rank)
        self._stages = topology.open_group(config.timeout_s, "pipeline")
        self._replicas = topology.open_group(config.timeout_s, "data")
        self._ends = self._open_ends(topology.groups("pipeline"), config.timeout_s)
        self._link = Link(self._chain, index, self._stages, self._dtype, self.device)
        self._prepare(optimizer, config.zero_stage if config.backend == "deepspeed" else 0)
        # NCCL wants all ranks of a group to take part in its first operation.
        dist.all_reduce(torch.zeros(1, device=self.device), group=self._stages)

    def accumulate(self, batches: Sequence[Any], function: LossFunction) -> Sums:
        """Add the gradients of this rank's micro-batches; the sums are known on every stage."""
        stage, found = self._stage, Sums()
        # What is random in the layers of one stage must not repeat itself in the next one.
        if stage.stage > 0:
            torch.manual_seed(derive_seed(torch.initial_seed(), "stage", stage.stage))
        alive: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}

        def forward(index: int, received: torch.Tensor | None) -> torch.Tensor | None:
            batch = batches[index].to(self.device)
            if received is not None:
                received.requires_grad_()
            made = stage.run(batch, received)
            if not self._last:
                alive[index] = received, made
                return made
            loss, sums = function(self.lm, made, batch)
            add(found, sums)
            alive[index] = received, loss
            return None

        def backward(index: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
            received, made = alive.pop(index)
            if made.requires_grad:
                torch.autograd.backward(made, gradient)
            self._collect()
            if received is None:
                return None
            return torch.zeros_like(received) if received.grad is None else received.grad

        run_forward_backward(self._link, self._shapes(batches), forward, backward)
        return self._share(found)

    @torch.no_grad()
    def measure(self, batches: Iterable[Any], function: Measurement) -> Sums:
        found: Sums = {}
        self.lm.eval()
        for batch in batches:
            (shape,) = self._shapes([batch])
            received, _ = self._link.exchange(from_previous=shape)
            batch = batch.to(self.device)
            made = self._stage.run(batch, received)
            if self._last:
                add(found, function(self.lm, made, batch))
            self._link.exchange(to_next=made)
        self.lm.train()
        return self._share(found)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """As the last stages have them, which are those that measure; a barrier for all."""
        if not self._last:
            values.zero_()
        dist.all_reduce(values)
        return values

    def backward(self, loss: torch.Tensor) -> None:
        raise NotImplementedError(
            "with engine.pipeline_parallel > 1 no rank can call the whole model; use accumulate"
        )

    def step(self, lr: float) -> float:
        gradients = self._sum_gradients()
        norm = self._norm(gradients)
        require_finite(norm)  # the same number on all ranks
        scale = min(1.0, self._clip / (norm + 1e-6))
        for name, master in self._masters.items():
            master.grad = gradients[name].mul_(scale)
        if self._optimizer is not None:
            set_rate(self._optimizer.param_groups, lr)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        for parameter in self._trained.values():
            parameter.grad = None
        self._gradients.clear()
        self._publish()
        return norm

    def weights(self, everywhere: bool = False) -> dict[str, torch.Tensor]:
        return self._gather(plain_weights(self.lm), everywhere or self.rank == 0)

    def exportable(self) -> dict[str, torch.Tensor]:
        if find_adaptation(self.lm) is None:
            return self.weights()
        return self._gather(trained_weights(self.lm), self.rank == 0)

    def fragments(self) -> list[Fragment]:
        """What two stages hold comes from the first, and without ZeRO everything from the first
        replica."""
        if self.data_rank > 0 and not self._shared:
            return []
        mine = self._masters
        if self._stage.stage > 0:
            mine = {name: m for name, m in mine.items() if name not in self._stage.tied}
        return read_shards(list_whole(mine), self._state)

    def restore(self, stored: StoredState) -> None:
        if self._optimizer is not None:
            fill_shards(list_whole(self._masters), self._optimizer, stored)
        self._publish()

    @property
    def _last(self) -> bool:
        return self._stage.stage == self._stage.stages - 1

    def _prepare(self, optimizer: OptimizerConfig, zero_stage: int) -> None:
        """Masters and optimizer of what this rank updates."""
        self.lm.to(self.device)
        self._trained = {n: p for n, p in self.lm.named_parameters() if p.requires_grad}
        self._shared = zero_stage == 1 and self.data_ranks > 1
        # Who updates what, and tells the other replicas.
        self._owners = _share_out(self._trained, self.data_ranks if self._shared else 1)
        mine = self.data_rank if self._shared else 0
        owned = [name for name, owner in self._owners.items() if owner == mine]
        self._masters = {name: self._trained[name] for name in owned}
        if self._dtype != torch.float32:
            self._masters = {name: _copy_master(self._trained[name]) for name in owned}
            narrow(self.lm, self._dtype)
        self._gradients: dict[str, torch.Tensor] = {}
        self._optimizer = (
            build_optimizer(self._masters.values(), optimizer) if self._masters else None
        )
        self._tied = [name for name in self._stage.tied if name in self._trained]

    def _open_ends(self, chains: list[list[int]], timeout_s: float) -> dist.ProcessGroup | None:
        """The group of the two stages that share the embedding, if they do. Collective."""
        if not self._stage.tied:
            return None
        mine = None
        for chain in chains:
            ends = [chain[0], chain[-1]]
            group = dist.new_group(ends, timeout=timedelta(seconds=timeout_s))
            if self.rank in ends:
                mine = group
        return mine

    def _shapes(self, batches: Sequence[Any]) -> list[Shape]:
        return [(*batch.tokens.shape, self._stage.width) for batch in batches]

    def _share(self, found: Sums) -> Sums:
        """What the last stage has measured, on every stage."""
        names = [sorted(found)]
        source = self._chain[-1]
        dist.broadcast_object_list(names, source, group=self._stages, device=self.device)
        if not names[0]:
            return {}
        table = torch.zeros((len(names[0]), 2), dtype=torch.float64, device=self.device)
        if self._last:
            table = torch.stack([found[name] for name in names[0]])
        dist.broadcast(table, source, group=self._stages)
        return dict(zip(names[0], table.unbind(), strict=True))

    def _collect(self) -> None:
        """Add bfloat16 gradients to float32 ones, after each micro-batch."""
        if self._dtype == torch.float32:
            return
        for name, parameter in self._trained.items():
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                held = self._gradients.get(name)
                self._gradients[name] = gradient if held is None else held.add_(gradient)
                parameter.grad = None

    def _sum_gradients(self) -> dict[str, torch.Tensor]:
        """Float32 gradients over all rows, by name; the same on all that hold a weight."""
        gradients = {}
        for name, parameter in self._trained.items():
            held = self._gradients.get(name, parameter.grad)
            gradients[name] = (
                torch.zeros_like(parameter, dtype=torch.float32) if held is None else held
            )
        if self._replicas is not None:
            _transfer(list(gradients.values()), partial(dist.all_reduce, group=self._replicas))
        for name in self._tied:
            if name in gradients:
                dist.all_reduce(gradients[name], group=self._ends)
        return gradients

    def _norm(self, gradients: Mapping[str, torch.Tensor]) -> float:
        """Over all stages; what two of them hold is counted by the first."""
        total = torch.zeros((), device=self.device)
        for name, gradient in gradients.items():
            if self._stage.stage == 0 or name not in self._tied:
                total += torch.linalg.vector_norm(gradient).square()
        dist.all_reduce(total, group=self._stages)
        return float(total.sqrt())

    @torch.no_grad()
    def _publish(self) -> None:
        """Weights of every replica, from the masters that were updated."""
        if self._dtype != torch.float32:
            for name, master in self._masters.items():
                self._trained[name].copy_(master)
        if not self._shared:
            return
        for owner in range(self.data_ranks):
            tensors = [self._trained[n].data for n, o in self._owners.items() if o == owner]
            source = self._peers[owner]
            _transfer(tensors, partial(dist.broadcast, src=source, group=self._replicas))

    @property
    def _state(self) -> Mapping[torch.Tensor, Mapping[str, Any]]:
        return {} if self._optimizer is None else self._optimizer.state

    def _gather(self, held: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
        """What all stages hold, the first of those that hold the same, on the CPU, one tensor at a
        time; without `keep` nothing. Collective."""
        whole: dict[str, torch.Tensor] = {}
        seen: set[str] = set()
        for stage, source in enumerate(self._chain):
            mine = stage == self._stage.stage
            table = [{name: (t.shape, t.dtype) for name, t in held.items()} if mine else {}]
            dist.broadcast_object_list(table, source, group=self._stages, device=self.device)
            for name, (shape, dtype) in table[0].items():
                if name in seen:
                    continue
                seen.add(name)
                tensor = (
                    held[name].contiguous()
                    if mine
                    else torch.empty(shape, dtype=dtype, device=self.device)
                )
                dist.broadcast(tensor, source, group=self._stages)
                if keep:
                    whole[name] = tensor.cpu()
        return whole


def _copy_master(parameter: nn.Parameter) -> nn.Parameter:
    master = nn.Parameter(parameter.detach().float().clone())
    vars(master).update(vars(parameter))  # `lr_scale`
    return master


def _find_group(groups: list[list[int]], rank: int) -> tuple[int, ...]:
    return next(tuple(group) for group in groups if rank in group)


def _share_out(parameters: Mapping[str, torch.Tensor], ranks: int) -> dict[str, int]:
    """Which of `ranks` updates each parameter: whole tensors, the largest first, to whoever has
    least."""
    loads, owners = [0] * ranks, {}
    for name in sorted(parameters, key=lambda n: (-parameters[n].numel(), n)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += parameters[name].numel()
    return {name: owners[name] for name in parameters}


def _transfer(tensors: Sequence[torch.Tensor], collective: Callable[[torch.Tensor], Any]) -> None:
    """Apply an in-place collective to tensors of one type, many at once."""
    bucket: list[torch.Tensor] = []
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        if index + 1 < len(tensors) and sum(t.numel() for t in bucket) < BUCKET:
            continue
        flat = torch.cat([t.flatten() for t in bucket])
        collective(flat)
        for held, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            held.copy_(part.view_as(held))
        bucket = []
