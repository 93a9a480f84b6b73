"""Whether a model can be trained as a recipe wants it, before any rank is started.

The ranks check the same, each when it comes to it: by then all of them have loaded the weights.
Here the model is built without memory for its weights, from its configuration alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from raylign.config import EngineConfig, UserError
from raylign.models.adapters import configure
from raylign.models.assembly import ModelPlan
from raylign.models.enclosure import is_bent
from raylign.models.heads import sketch_scorer
from raylign.models.loading import load_config
from raylign.models.prompts import read_shape
from raylign.models.quantization import list_matrices
from raylign.models.sequence import require_exchangeable
from raylign.training.deepspeed_tensor import require_known
from raylign.training.pipeline_stage import Stage
from raylign.training.topology import arrange, require_divisible

_IN_FRONT = ("prefix", "prompt")


def require_trainable(plan: ModelPlan, engine: EngineConfig, ranks: int, name: str) -> None:
    """Raises `UserError` for a model of the stage `name` that its head, adapter or engine cannot
    work on: the first of all that a rank would raise."""
    where = f"{name}.engine"
    arrange(engine, ranks, where)
    lm = sketch(plan)
    if plan.head == "language":
        is_bent(lm.config)
    if engine.tensor_parallel * engine.sequence_parallel > 1:
        require_divisible(engine, lm.config.get_text_config(), where)
    if engine.tensor_parallel > 1:
        if plan.peft != "none":
            raise UserError(
                f"{where}.tensor_parallel: adapters cannot be cut; set it to 1, or peft=none"
            )
        require_known(lm)
    if engine.sequence_parallel > 1:
        require_exchangeable(lm, plan.peft)
    if plan.peft != "none":
        _require_adaptable(plan, lm)
    if engine.pipeline_parallel > 1:
        if plan.peft in _IN_FRONT:
            raise UserError(
                f"{where}.pipeline_parallel: peft=prefix and peft=prompt need the whole model; use "
                "lora"
            )
        Stage(lm, 0, engine.pipeline_parallel)  # the last check: it takes the model apart


def sketch(plan: ModelPlan) -> PreTrainedModel:
    """The model of a plan before it is adapted, on torch's meta device."""
    config: PreTrainedConfig = (
        load_config(plan.start) if isinstance(plan.start, Path) else plan.start
    )
    if plan.head != "language":
        named = plan.start if isinstance(plan.start, Path) else config.model_type
        return sketch_scorer(config, plan.head, named)
    with torch.device("meta"):
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return lm


def _require_adaptable(plan: ModelPlan, lm: PreTrainedModel) -> None:
    if plan.peft in ("prefix", "prompt"):
        read_shape(lm, plan.peft)
        return
    configure(lm, plan.peft, plan.adapter, plan.seed)
    if plan.peft == "qlora":
        list_matrices(lm)
