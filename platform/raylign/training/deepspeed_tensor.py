"""Tensor parallelism by DeepSpeed's AutoTP: which matrices are cut, and how they are put together.

Projections that fan out are cut by rows of the weight (outputs), those that come back by columns
(inputs; Shoeybi et al., 2019), so a block needs one sum over ranks for attention and one for the
feed-forward part, each way. Embeddings, the head and the norms are whole on every rank: their
inputs and gradients are the same there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from raylign.config import UserError
from raylign.models.adapters import find_adaptation
from raylign.training.fragments import Place

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc_in")
"""Projections of the blocks whose outputs are shared out."""
ROW = ("o_proj", "down_proj", "out_proj", "fc_out")
"""Projections whose inputs are."""


def describe_cutting(size: int) -> dict[str, Any]:
    """DeepSpeed's section of the configuration for `size` ranks."""
    specs = [
        {"patterns": [rf".*\.{name}\.weight$" for name in names], "partition_type": kind}
        for names, kind in ((COLUMN, "column"), (ROW, "row"))
    ]
    return {
        "autotp_size": size,
        "partition_config": {"use_default_specs": False, "layer_specs": specs},
    }


def require_known(lm: PreTrainedModel) -> None:
    """Raises `UserError` for a model with parts that nothing is known about."""
    kind = lm.config.model_type
    if find_adaptation(lm):
        raise UserError("engine.tensor_parallel: adapters cannot be cut; set it to 1, or peft=none")
    norms = {id(module) for module in lm.modules() if not list(module.children())}
    for name, module in lm.get_decoder().named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[-1] not in COLUMN + ROW:
            raise UserError(
                f"engine.tensor_parallel: how to cut {name} of a {kind} is not known; set it to 1"
            )
        inside = ".self_attn." in f".{name}." or ".attn." in f".{name}."
        own = inside and id(module) in norms and list(module.parameters(recurse=False))
        if own and not isinstance(module, nn.Linear):
            raise UserError(
                f"engine.tensor_parallel: {name} of a {kind} would see some heads only; set it to 1"
            )


def list_places(lm: nn.Module, whole: Mapping[str, torch.Size], rank: int) -> dict[str, Place]:
    """What the tensor rank `rank` holds of each parameter, given the shapes before cutting."""
    places = {}
    for name, parameter in lm.named_parameters():
        shape, local = tuple(whole[name]), tuple(parameter.shape)
        cut = [dim for dim in range(len(shape)) if shape[dim] != local[dim]]
        assert len(cut) <= 1, f"{name} is {local} of {shape}"
        if cut:
            size = local[cut[0]]
            places[name] = Place(shape, cut[0], rank * size, (rank + 1) * size)
        else:
            places[name] = Place(shape)
    return places


def gather_tensors(
    lm: nn.Module, places: Mapping[str, Place], group: dist.ProcessGroup, keep: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole parameters by name, on the CPU, one at a time; none without `keep`. Collective."""
    for name, parameter in lm.named_parameters():
        whole = _gather_whole(parameter.detach(), places[name], group)
        if keep:
            yield name, whole.cpu()


def _gather_whole(tensor: torch.Tensor, place: Place, group: dist.ProcessGroup) -> torch.Tensor:
    if place.dim is None:
        return tensor
    mine = tensor.contiguous()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return torch.cat(parts, dim=place.dim)


def mark_masters(optimizer: Any) -> None:
    """Tell float32 masters that their parameters are cut, as `measure_norm` must know."""
    groups = zip(
        getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True
    )
    for parameters, masters in groups:
        for parameter, master in zip(parameters, masters, strict=True):
            master.tensor_model_parallel = getattr(parameter, "tensor_model_parallel", False)


def measure_norm(parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> torch.Tensor:
    """Global norm of the gradients of parameters on tensor ranks, whole ones counted once."""
    gradients: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for parameter in parameters:
        if parameter.grad is not None:
            gradients[getattr(parameter, "tensor_model_parallel", False)].append(parameter.grad)
    cut, kept = (nn.utils.get_total_norm(gradients[is_cut]).square() for is_cut in (True, False))
    if group is not None:
        dist.all_reduce(cut, group=group)
    return (cut + kept).sqrt()
