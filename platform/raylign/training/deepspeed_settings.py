"""What DeepSpeed is told: its own configuration, from ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raylign.config import EngineConfig
from raylign.training.deepspeed_tensor import describe_cutting


def describe(config: EngineConfig, model: nn.Module, clip: float) -> dict[str, Any]:
    """DeepSpeed's own configuration; `clip` 0 leaves gradients alone."""
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
            # Numbers up to which a weight stays whole on every rank. DeepSpeed's own 1e5 would keep
            # all of a small model; of a large one it is some vectors.
            "stage3_param_persistence_threshold": min(100_000, numel // 100),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "log_level": "error",
    }
    if config.tensor_parallel > 1:
        settings["tensor_parallel"] = describe_cutting(config.tensor_parallel)
    if config.offload != "none":
        # Our optimizer steps on the CPU; DeepSpeed's own would be compiled for a minute first.
        settings["zero_force_ds_cpu_optimizer"] = False
        memory = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        settings["zero_optimization"]["offload_optimizer"] = memory
        if config.offload == "all":
            settings["zero_optimization"]["offload_param"] = dict(memory)
    if config.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True}
        if config.zero_stage > 0:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        if config.zero_stage < 2:  # those that reduce once a step, what they have summed in float32
            settings["communication_data_type"] = "fp32"
    return settings
