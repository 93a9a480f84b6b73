"""Frozen weights in 4 or 8 bits by bitsandbytes (QLoRA; Dettmers et al., 2023), on any device.

What the matrices become is a function of the weights they were, so nothing quantised is ever saved.
"""

from __future__ import annotations

import copy
import logging
import os
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raylign.config import UserError

Quantization = Literal["nf4", "fp4", "int8"]


def quantize(lm: PreTrainedModel, kind: Quantization) -> None:
    """Replace the decoder's matrices, in place, on the GPU if there is one; embeddings, norms and
    heads stay as they are. 4-bit kinds quantise the block scales as well.

    Raises `UserError` for a model whose decoder keeps its weights in no matrices of torch.
    """
    device = _find_device()
    decoder = lm.get_decoder()
    for name, module in list_matrices(lm):
        place, _, child = name.rpartition(".")
        setattr(decoder.get_submodule(place), child, _quantize_matrix(module, kind, device))
    if device.type != "cpu":
        lm.to(device)
    # By these peft knows which of its layers to wrap around ours.
    setattr(lm, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)


def list_matrices(lm: PreTrainedModel) -> list[tuple[str, Any]]:
    """Matrices that `quantize` replaces, and their names in the decoder; raises `UserError` when
    there are none."""
    modules = lm.get_decoder().named_modules()
    found = [(name, module) for name, module in modules if type(module) in (nn.Linear, Conv1D)]
    if not found:
        raise UserError(
            f"peft=qlora: a {lm.config.model_type} has no matrices that can be quantised; use lora"
        )
    return found


def dequantize(lm: PreTrainedModel) -> None:
    """Put plain matrices, of the values that the quantised ones stand for, back in place."""
    for name, module in list(lm.named_modules()):
        if is_quantized(module):
            place, _, child = name.rpartition(".")
            plain = build_plain(module, orient(module, read_weight(module)), module.bias)
            setattr(lm.get_submodule(place), child, plain)
    for mark in ("is_loaded_in_8bit", "is_loaded_in_4bit"):
        if hasattr(lm, mark):
            delattr(lm, mark)


def build_plain(quantized: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """The module that `quantized` took the place of, with a weight as that has it, and a bias."""
    made: Any
    if is_transposed(quantized):
        with torch.device("meta"):
            made = Conv1D(weight.shape[1], weight.shape[0])
    else:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight)
    made.bias = None if bias is None else nn.Parameter(bias)
    plain: nn.Module = made
    return plain


def is_transposed(module: nn.Module) -> bool:
    """Whether the plain module keeps its weight as [in, out], as GPT-2's does."""
    return isinstance(module, Conv1D) or getattr(module, "in_place_of", None) is Conv1D


def orient(quantized: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] as the module has it that `quantized` took the place of."""
    return weight.t().contiguous() if is_transposed(quantized) else weight


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a matrix of `quantize`."""
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def read_weight(module: Any) -> torch.Tensor:
    """The weight of a matrix as it has it; of a quantised one the float32 values that it stands
    for, always [out, in]."""
    weight = module.weight
    if not is_quantized(module):
        plain: torch.Tensor = weight.detach()
        return plain
    from bitsandbytes.functional import dequantize_4bit

    if type(weight).__name__ == "Params4bit":
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32
        whole: torch.Tensor = dequantize_4bit(weight.data, state)
        return whole
    # After its first call the layer keeps the scales, of rows, elsewhere.
    scales = weight.SCB if module.state.SCB is None else module.state.SCB
    scaled: torch.Tensor = weight.data * (scales.view(-1, 1) / 127)
    return scaled


def count_weights(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for, whatever they are stored in."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())


def _find_device() -> torch.device:
    """Where this rank computes; DeepSpeed goes by the same variable."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def quieten() -> None:
    """Before bitsandbytes is imported, as peft does: it warns at every call in 8 bits, and of a
    slower, and exact, way to compute on CPUs."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _quantize_matrix(
    matrix: nn.Linear | Conv1D, kind: Quantization, device: torch.device
) -> nn.Module:
    quieten()
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    transposed = isinstance(matrix, Conv1D)
    weight = matrix.weight.data.t().contiguous() if transposed else matrix.weight.data
    size = (weight.shape[1], weight.shape[0], matrix.bias is not None)
    made: Any
    if kind == "int8":
        made = Linear8bitLt(*size, has_fp16_weights=False, device="meta")
        made.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        made = Linear4bit(*size, compress_statistics=True, quant_type=kind, device="meta")
        made.weight = Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=True,
            quant_type=kind,
            module=made,
        )
        # On some CPUs it would repack its weights for inference, and compute in bfloat16.
        made.support_avx512bf16_for_cpu = False
    made.bias = matrix.bias
    made.in_place_of = type(matrix)
    quantized: nn.Module = made.to(device)
    return quantized
