"""Which stretches of which parameters a rank's DeepSpeed optimizer steps, at every ZeRO stage.

The layouts are DeepSpeed's own: without ZeRO an optimizer of parameters or of their float32 copies,
at stages 1 and 2 one flat master a parameter group with a mapping to parameters, at stage 3 flat
masters of partitions padded to equal length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from raylign.training.fragments import Place, Shard


def list_shards(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], places: Mapping[str, Place]
) -> Iterator[Shard]:
    """What this rank steps of the trained among `parameters`. `optimizer` is DeepSpeed's."""
    trained: dict[str, Any] = {name: p for name, p in parameters.items() if p.requires_grad}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from _list_partitions(optimizer, trained)
        return
    if hasattr(optimizer, "fp32_groups"):
        copies = {
            id(p): master
            for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for p, master in zip(group, masters, strict=True)
        }
        for name, p in trained.items():
            yield Shard(name, places[name], 0, p.numel(), copies[id(p)])
    elif flats := _find_flats(optimizer):
        for name, p in trained.items():
            mapping = p._hp_mapping
            if mapping is not None:
                held, at = mapping.lp_fragment_address, mapping.hp_fragment_address
                flat = flats[mapping.param_group_index]
                yield Shard(name, places[name], held.start, held.numel, flat, at.start)
    else:
        for name, p in trained.items():
            yield Shard(name, places[name], 0, p.numel(), p)


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Torch's optimizer inside DeepSpeed's, or what is not wrapped."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


@torch.no_grad()
def refresh(optimizer: Any) -> None:
    """Make the weights follow their masters. Collective where they are partitioned."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        kept = optimizer.persistent_parameters
        if kept:
            kept[0].partition(kept)
        masters = optimizer.fp32_partitioned_groups_flat
        for index, master in enumerate(masters):
            optimizer.fp16_partitioned_groups_flat[index].copy_(master)
            optimizer._unflatten_partitioned_parameters(index)
        if kept:
            kept[0].all_gather(kept)
    elif hasattr(optimizer, "fp32_groups"):
        for group, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for p, master in zip(group, copies, strict=True):
                p.copy_(master)
    elif _find_flats(optimizer):
        optimizer.update_lp_params()


@torch.no_grad()
def add_gradients(sums: dict[nn.Parameter, torch.Tensor], optimizer: Any) -> None:
    """Take the bfloat16 gradients of a backward pass into float32 `sums`, by parameter. `optimizer`
    is DeepSpeed's without ZeRO."""
    for parameter in (p for group in optimizer.fp16_groups for p in group):
        if parameter.grad is not None:
            gradient = parameter.grad.float()
            sums[parameter] = sums[parameter].add_(gradient) if parameter in sums else gradient
            parameter.grad = None


def hand_over(sums: Mapping[nn.Parameter, torch.Tensor], optimizer: Any) -> list[torch.Tensor]:
    """Make `sums` the gradients of the float32 masters, zero where there are none; all of them."""
    found = []
    for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, master in zip(group, masters, strict=True):
            gradient = sums.get(parameter)
            master.grad = torch.zeros_like(master) if gradient is None else gradient
            found.append(master.grad)
    return found


def _find_flats(optimizer: Any) -> list[torch.Tensor]:
    """This rank's flat master of every parameter group; none without ZeRO."""
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return []


def _list_partitions(optimizer: Any, trained: Mapping[str, Any]) -> Iterator[Shard]:
    for name, p in trained.items():
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
        start = size * optimizer._get_param_partition_rank(p)
        numel = min(size, p.ds_numel - start)  # the last partitions are padded
        if numel > 0:
            flat = optimizer.fp32_partitioned_groups_flat[group]
            yield Shard(name, Place(tuple(p.ds_shape)), start, numel, flat, offset)
