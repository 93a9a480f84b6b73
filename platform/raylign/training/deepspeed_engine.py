"""DeepSpeed ZeRO 0-3 (Rajbhandari et al., 2020); the only file that imports deepspeed."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import PreTrainedModel

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when deepspeed is imported

import deepspeed
from deepspeed.utils import groups

from raylign.config import EngineConfig, OptimizerConfig
from raylign.models.adapters import find_adaptation
from raylign.models.enclosure import Enclosure
from raylign.models.folding import plain_weights, trained_weights
from raylign.models.loading import DTYPES
from raylign.models.precision import narrow
from raylign.models.sequence import share_sequences
from raylign.runtime import derive_seed
from raylign.training import passes
from raylign.training.deepspeed_settings import describe
from raylign.training.deepspeed_state import (
    add_gradients,
    hand_over,
    inner_optimizer,
    list_shards,
    refresh,
)
from raylign.training.deepspeed_tensor import (
    gather_tensors,
    list_places,
    mark_masters,
    measure_norm,
    require_known,
)
from raylign.training.engine import build_optimizer, require_finite, set_rate
from raylign.training.fragments import Fragment, Place, Shard, StoredState, fill_shards, read_shards
from raylign.training.sums import LossFunction, Measurement, Sums
from raylign.training.topology import Topology, arrange, require_divisible


class DeepSpeedEngine:
    """Shares out optimizer state (stage 1), gradients (2) and weights (3) over the ranks."""

    def __init__(
        self, config: EngineConfig, model: PreTrainedModel, optimizer: OptimizerConfig
    ) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # It calls collectives by names that torch has since changed, thousands of times.
        warnings.filterwarnings("ignore", r"`torch\.distributed\..*deprecated", FutureWarning)
        # Else DeepSpeed tries the compiler on all its C++ operators and builds one, for inference
        # through shared memory, that training never calls.
        deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
        _ensure_process_group(config.timeout_s)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        topology = arrange(config, self.world_size)
        self.data_rank, self.data_ranks = topology.place(self.rank, "data"), topology.data
        self._first = self.rank < topology.tensor  # of those with the same rows and weights
        self._piece = topology.place(self.rank, "sequence")
        self._data = topology.open_group(config.timeout_s, "data")
        self.lm = model
        self.whole = config.zero_stage < 3 and topology.tensor == topology.sequence == 1
        self._stage = config.zero_stage
        self._norm = math.nan
        self._tensor: dist.ProcessGroup | None = None
        if topology.tensor > 1:
            require_known(model)
        if topology.tensor * topology.sequence > 1:
            require_divisible(config, model.config)
        self._share_sequences(topology, config.timeout_s)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        # DeepSpeed would make the masters of weights that have been rounded before.
        rounded = config.dtype != "float32"
        exact = {n: p.data for n, p in model.named_parameters() if p.requires_grad and rounded}
        client = build_optimizer(model.parameters(), optimizer)
        if self._stage == 0:
            self._clip_in(client, optimizer.clip)
        else:
            self._stop_before_nonsense(client)
        clip = 0.0 if self._stage == 0 else optimizer.clip
        settings = describe(config, model, clip)
        narrow(model, DTYPES[config.dtype])
        self._deepspeed = _open_deepspeed(model, client, settings, self._stage)
        self.module: nn.Module = self._deepspeed
        self.device = torch.device(self._deepspeed.device)
        if topology.tensor > 1:
            self._tensor = groups.get_tensor_model_parallel_group()
            # It pickles the first inputs and compares them by ==, which arrays do not have.
            self._deepspeed.first_dataloader_check.remove()
            if self._stage == 0:
                mark_masters(self._deepspeed.optimizer)
        self._places: dict[str, Place] = {}
        if self._stage < 3:
            self._places = list_places(model, shapes, topology.place(self.rank, "tensor"))
        self._sums: dict[nn.Parameter, torch.Tensor] | None = None
        if rounded:
            self._begin(exact)
        # DeepSpeed makes groups of its own, with torch's timeout of half an hour.
        for group in (self._deepspeed.seq_data_parallel_group, self._tensor):
            if group is not None:
                _set_pg_timeout(timedelta(seconds=config.timeout_s), group)

    def _begin(self, exact: dict[str, torch.Tensor]) -> None:
        """Make masters of float32 weights, which DeepSpeed has not seen. Without ZeRO it has let
        the optimizer take a step, of gradients that are zero: that counts, and decays weights."""
        for shard in self._shards():
            whole = shard.place.cut(exact[shard.name]).reshape(-1)
            shard.fill(shard.flat, whole.narrow(0, shard.start, shard.numel))
        if self._stage == 0:
            inner_optimizer(self._deepspeed.optimizer).state.clear()
            self._sums = {}

    def _share_sequences(self, topology: Topology, timeout_s: float) -> None:
        group = topology.open_group(timeout_s, "sequence")
        if group is not None:
            shape, tensor = self.lm.config, topology.tensor
            heads = shape.num_attention_heads
            kv_heads = getattr(shape, "num_key_value_heads", None) or heads
            share_sequences(self.lm, group, heads // tensor, kv_heads // tensor)

    def backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed averages over the ranks of which each has the gradient of its own loss; the loss
        # carries its global denominator already, and all ranks of a sequence compute the same.
        self._deepspeed.backward(loss * self.data_ranks)
        if self._sums is not None:
            add_gradients(self._sums, self._deepspeed.optimizer)

    def step(self, lr: float) -> float:
        set_rate(self._deepspeed.optimizer.param_groups, lr)
        self._norm = math.nan  # stays when DeepSpeed leaves the step out by itself, as it may
        if self._sums is None:
            self._deepspeed.step()
        else:
            self._step_masters(self._sums)
        norm = self._norm if self._stage == 0 else self._deepspeed.get_global_grad_norm()
        require_finite(float(norm))
        return float(norm)

    def accumulate(self, batches: Sequence[Any], function: LossFunction) -> Sums:
        if self._piece > 0:
            # Or every piece of a sequence would lose the same neurons to dropout.
            torch.manual_seed(derive_seed(torch.initial_seed(), "sequence", self._piece))
        return passes.accumulate(self, batches, function)

    def measure(self, batches: Iterable[Any], function: Measurement) -> Sums:
        return passes.measure(self, batches, function)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        if self._data is not None:
            dist.all_reduce(values, group=self._data)
        return values

    def weights(self, everywhere: bool = False) -> dict[str, torch.Tensor]:
        keep = everywhere or self.rank == 0
        if self._stage == 3:
            return plain_weights(self.lm, deepspeed.zero.GatheredParameters, keep)
        if find_adaptation(self.lm) or self._tensor is None:
            return plain_weights(self.lm)
        return dict(gather_tensors(self.lm, self._places, self._tensor, keep))

    def exportable(self) -> dict[str, torch.Tensor]:
        if not find_adaptation(self.lm):
            return self.weights()
        gather = deepspeed.zero.GatheredParameters if self._stage == 3 else None
        return trained_weights(self.lm, gather, keep=self.rank == 0)

    def fragments(self) -> list[Fragment]:
        if self._stage == 0 and not self._first:
            return []
        return read_shards(self._shards(), inner_optimizer(self._deepspeed.optimizer).state)

    def restore(self, stored: StoredState) -> None:
        fill_shards(self._shards(), inner_optimizer(self._deepspeed.optimizer), stored)
        refresh(self._deepspeed.optimizer)

    def _shards(self) -> list[Shard]:
        parameters = dict(self.lm.named_parameters())
        return list(list_shards(self._deepspeed.optimizer, parameters, self._places))

    def _step_masters(self, sums: dict[nn.Parameter, torch.Tensor]) -> None:
        """What DeepSpeed's step without ZeRO would do with bfloat16 gradients, with float32 ones:
        reduce over ranks, and step the masters."""
        wrapper = self._deepspeed.optimizer
        self._deepspeed.buffered_allreduce_fallback(grads=hand_over(sums, wrapper))
        inner = inner_optimizer(wrapper)
        inner.step()
        inner.zero_grad(set_to_none=True)
        sums.clear()
        refresh(wrapper)

    def _clip_in(self, client: torch.optim.Optimizer, clip: float) -> None:
        """Without ZeRO, DeepSpeed clips but does not tell the norm; so do both here, after it has
        averaged the gradients over ranks and before the optimizer uses them."""

        def clip_gradients(stepping: torch.optim.Optimizer, *_: Any) -> None:
            parameters = [p for group in stepping.param_groups for p in group["params"]]
            norm = measure_norm(parameters, self._tensor)
            self._norm = float(norm)
            require_finite(self._norm)
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)

        client.register_step_pre_hook(clip_gradients)

    def _stop_before_nonsense(self, client: torch.optim.Optimizer) -> None:
        """DeepSpeed computes the global norm and then steps; it is looked at in between, where it
        is the same on all ranks and nothing has been changed."""

        def check(*_: Any) -> None:
            require_finite(float(self._deepspeed.optimizer._global_grad_norm))

        client.register_step_pre_hook(check)


def _open_deepspeed(
    lm: PreTrainedModel, client: torch.optim.Optimizer, settings: dict[str, Any], stage: int
) -> deepspeed.DeepSpeedEngine:
    """`lm` has the type of what is computed already."""
    enclosure = Enclosure(lm)
    buffers = {name: b.clone() for name, b in enclosure.named_buffers() if b.is_floating_point()}
    # The groups of an engine before this one: DeepSpeed would go on using them.
    groups._release_process_group_references()
    with redirect_stdout(StringIO()):  # some of its optimizers print how much memory there is
        if stage == 3:
            _partition(enclosure, settings)
        engine, *_ = deepspeed.initialize(model=enclosure, optimizer=client, config=settings)
    for name, buffer in enclosure.named_buffers():
        # Rotary frequencies, which it may have cast to the weights' type; what it may not have
        # moved where it was given partitions.
        buffer.data = buffers.get(name, buffer).to(engine.device)
    return engine


def _partition(enclosure: Enclosure, settings: dict[str, Any]) -> None:
    """Share out the weights one by one: `initialize` would move all of them to the device first."""
    head = enclosure.lm.get_output_embeddings()
    if head is not None:
        # A language head's weight is used by bodies, outside the module that owns it.
        deepspeed.zero.register_external_parameter(enclosure, head.weight)
    deepspeed.init_distributed()
    deepspeed.zero.Init(module=enclosure, config_dict_or_path=settings)


def _ensure_process_group(timeout_s: float) -> None:
    """DeepSpeed wants a process group even for a single process, and a local rank: the index of its
    device, 0 unless the launcher says otherwise (a Ray actor sees its own devices only)."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=dist.HashStore(),
            rank=0,
            world_size=1,
            timeout=timedelta(seconds=timeout_s),
        )
