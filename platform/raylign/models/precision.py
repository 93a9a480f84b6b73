"""What a model is stored and computed in."""

from __future__ import annotations

import torch
from torch import nn


def narrow(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights and leave buffers alone: rotary frequencies in bfloat16 would turn a token
    500 places on by up to a radian too much or too little."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
