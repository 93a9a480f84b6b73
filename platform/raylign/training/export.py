"""What a trained model leaves behind for every other tool."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raylign.models.adapters import find_adaptation, save_adapter
from raylign.models.loading import save_model
from raylign.training.engine import Engine

MODEL = "model"
ADAPTER = "adapter"


def export_stage(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, output: Path
) -> dict[str, Any]:
    """What a finished stage holds for others: `model/`, a plain model; and where an adapter was
    trained, `adapter/` in PEFT's form. `model/` has the adapter folded in; where that cannot be,
    there is none. Collective; returns what the summary says of it."""
    adaptation = find_adaptation(engine.lm)
    if adaptation is not None:
        trained = engine.exportable()
        if engine.rank == 0:
            export_model(engine.lm, trained, tokenizer, output / ADAPTER)
    if adaptation is None or adaptation.foldable:
        weights = engine.weights()
        if engine.rank == 0:
            save_model(weights, engine.lm.config, tokenizer, output / MODEL)
    return {} if adaptation is None else adaptation.summarise()


def export_model(
    lm: PreTrainedModel,
    weights: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
) -> None:
    """Write a directory that other tools load: weights, configuration, tokenizer, chat template;
    of an adapted model the adapter, in PEFT's form, in place of weights and configuration.

    `weights` are whole, by name in `lm`, at least the trained ones; `lm` itself may be partitioned,
    and gives what is not a weight. Called by one rank, and by a thread beside the training loop: it
    must not change `lm`.
    """
    if find_adaptation(lm) is None:
        save_model(weights, lm.config, tokenizer, directory)
    else:
        save_adapter(lm, weights, directory)
        tokenizer.save_pretrained(directory)
