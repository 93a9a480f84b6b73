"""DeepSpeed ZeRO 0-3 (Rajbhandari et al., 2020); the only file that imports deepspeed."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import PreTrainedModel

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when deepspeed is imported

import deepspeed

from raylign.config import EngineConfig, OptimizerConfig
from raylign.models.enclosure import Enclosure
from raylign.training import passes
from raylign.training.engine import build_optimizer, require_finite
from raylign.training.sums import LossFunction, Measurement, Sums

TAG = "state"


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
        self.data_rank, self.data_ranks = self.rank, self.world_size
        self.lm, self.whole = model, config.zero_stage < 3
        self._stage = config.zero_stage
        self._norm: float | None = None
        client = build_optimizer(model.parameters(), optimizer)
        if self._stage == 0:
            self._clip_in(client, optimizer.clip)
        else:
            self._stop_before_nonsense(client)
        enclosure = Enclosure(model)
        if self._stage == 3:
            # The head's weight is used by bodies, outside the module that owns it.
            head = model.get_output_embeddings()
            deepspeed.zero.register_external_parameter(enclosure, head.weight)
        self._deepspeed, *_ = deepspeed.initialize(
            model=enclosure,
            optimizer=client,
            config=_settings(config, model, 0.0 if self._stage == 0 else optimizer.clip),
        )
        self.module: nn.Module = self._deepspeed
        self.device = torch.device(self._deepspeed.device)
        # DeepSpeed makes groups of its own, with torch's timeout of half an hour.
        group = self._deepspeed.seq_data_parallel_group
        _set_pg_timeout(timedelta(seconds=config.timeout_s), group)

    def backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed averages over ranks; the loss carries its global denominator already.
        self._deepspeed.backward(loss * self.world_size)

    def step(self, lr: float) -> float:
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self._deepspeed.step()
        norm = self._norm if self._stage == 0 else self._deepspeed.get_global_grad_norm()
        assert norm is not None
        require_finite(float(norm))  # in float32 DeepSpeed has left the step out by itself
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
        if self._stage < 3:
            return {name: p.detach() for name, p in self.lm.named_parameters()}
        whole = {}
        for name, parameter in self.lm.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                whole[name] = parameter.detach().clone()
        return whole

    def save(self, directory: Path) -> None:
        self._deepspeed.save_checkpoint(str(directory), tag=TAG, save_latest=False)

    def load(self, directory: Path) -> None:
        path, _ = self._deepspeed.load_checkpoint(str(directory), tag=TAG)
        if path is None:
            raise FileNotFoundError(f"{directory} holds no checkpoint of {self.world_size} ranks")

    def _clip_in(self, client: torch.optim.Optimizer, clip: float) -> None:
        """Without ZeRO, DeepSpeed clips but does not tell the norm; so do both here, after it has
        averaged the gradients over ranks and before the optimizer uses them."""

        def clip_gradients(stepping: torch.optim.Optimizer, *_: Any) -> None:
            parameters = [p for group in stepping.param_groups for p in group["params"]]
            self._norm = float(nn.utils.clip_grad_norm_(parameters, clip))
            require_finite(self._norm)

        client.register_step_pre_hook(clip_gradients)

    def _stop_before_nonsense(self, client: torch.optim.Optimizer) -> None:
        """DeepSpeed computes the global norm and then steps; it is looked at in between, where it
        is the same on all ranks and nothing has been changed."""

        def check(*_: Any) -> None:
            require_finite(float(self._deepspeed.optimizer._global_grad_norm))

        client.register_step_pre_hook(check)


def _settings(config: EngineConfig, model: nn.Module, clip: float) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    numel = sum(p.numel() for p in model.parameters())
    bucket = min(numel, 2**27)  # the default allocates 5e8 numbers whatever the model
    settings: dict[str, Any] = {
        # Nominal: micro-batches vary in size and number, and step() alone ends an accumulation.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "log_level": "error",
    }
    if config.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True}
        if config.zero_stage > 0:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


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
