"""Forward and backward over the micro-batches of a step, for engines that hold a whole decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from raylign.models.enclosure import run_inside
from raylign.training.engine import Engine
from raylign.training.objectives import embed_batch
from raylign.training.sums import LossFunction, Measurement, Sums, add


def accumulate(engine: Engine, batches: Iterable[Any], function: LossFunction) -> Sums:
    """Add the gradients of all micro-batches; this rank's sums."""
    found: Sums = {}
    for batch in batches:
        loss, sums = run_inside(engine.module, _apply, batch.to(engine.device), function)
        engine.backward(loss)
        add(found, sums)
    return found


@torch.no_grad()
def measure(engine: Engine, batches: Iterable[Any], function: Measurement) -> Sums:
    """This rank's sums over all micro-batches, without gradients, in evaluation mode."""
    found: Sums = {}
    engine.module.eval()
    for batch in batches:
        add(found, run_inside(engine.module, _apply, batch.to(engine.device), function))
    engine.module.train()
    return found


def _apply(lm: PreTrainedModel, batch: Any, function: Callable[..., Any]) -> Any:
    return function(lm, embed_batch(lm, batch), batch)
