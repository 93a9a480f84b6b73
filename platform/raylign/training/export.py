"""What a trained model leaves behind for every other tool."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raylign.models.loading import save_model


def export_model(
    lm: PreTrainedModel,
    weights: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
) -> None:
    """Write a directory that other tools load: weights, configuration, tokenizer, chat template.

    `weights` are whole, by name in `lm`; `lm` itself may be partitioned, and gives what is not a
    weight. Called by one rank, and by a thread beside the training loop: it must not change `lm`.
    """
    save_model(weights, lm.config, tokenizer, directory)
