"""Which rank holds what: the arithmetic of parallelism, and what is refused before anything starts.

Ranks are numbered so that those which talk most stand next to each other: tensor ranks, then
sequence ranks, then data ranks, then the stages of a pipeline.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from raylign.config import EngineConfig, UserError

if TYPE_CHECKING:
    import torch.distributed as dist
    from transformers import PreTrainedConfig

Axis = Literal["tensor", "sequence", "data", "pipeline"]
AXES: tuple[Axis, ...] = ("tensor", "sequence", "data", "pipeline")
"""From the fastest to the slowest counted."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks as points of a grid."""

    tensor: int = 1
    """Ranks that share every matrix."""
    sequence: int = 1
    """Ranks that share every sequence."""
    data: int = 1
    """Shares of a step's rows."""
    pipeline: int = 1
    """Ranks that share the layers."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.sequence * self.data * self.pipeline

    def place(self, rank: int, axis: Axis) -> int:
        """Where `rank` stands along an axis."""
        before = math.prod(self._size(a) for a in itertools.takewhile(lambda a: a != axis, AXES))
        return rank // before % self._size(axis)

    def groups(self, *axes: Axis) -> list[list[int]]:
        """All ranks, as lists of those that differ along `axes` only; each in ascending order."""
        held = [axis for axis in AXES if axis not in axes]
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            found.setdefault(tuple(self.place(rank, axis) for axis in held), []).append(rank)
        return list(found.values())

    def open_group(self, timeout_s: float, *axes: Axis) -> dist.ProcessGroup | None:
        """This rank's group of `groups(*axes)`; None when it would be alone. Collective."""
        import torch.distributed as dist  # a plan does arithmetic only, and does not pay for it

        if math.prod(self._size(axis) for axis in axes) == 1:
            return None
        mine = None
        for ranks in self.groups(*axes):
            group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s))
            if dist.get_rank() in ranks:
                mine = group
        return mine

    def _size(self, axis: Axis) -> int:
        size: int = getattr(self, axis)
        return size


def arrange(config: EngineConfig, ranks: int, where: str = "engine") -> Topology:
    """How `ranks` are shared out; those that nothing else needs are data parallel.

    Raises `UserError` when the numbers do not divide, or for a combination that no engine can do;
    `where` is the key of `config` in the user's recipe.
    """
    _refuse_combinations(config, where)
    shared = config.tensor_parallel * config.sequence_parallel * config.pipeline_parallel
    if ranks % shared:
        raise UserError(
            f"{ranks} ranks cannot be shared out: {where}.tensor_parallel="
            f"{config.tensor_parallel} x sequence_parallel={config.sequence_parallel} x "
            f"pipeline_parallel={config.pipeline_parallel} is {shared}; make the number of ranks "
            f"(workers.count) a multiple of it"
        )
    return Topology(
        config.tensor_parallel, config.sequence_parallel, ranks // shared, config.pipeline_parallel
    )


def require_divisible(config: EngineConfig, model: PreTrainedConfig, where: str = "engine") -> None:
    """Raises `UserError` unless the model's heads and widths can be shared out by `config`."""
    tensor, sequence = config.tensor_parallel, config.sequence_parallel
    heads: int = model.num_attention_heads
    kv_heads: int = getattr(model, "num_key_value_heads", None) or heads
    inner: int = (
        getattr(model, "intermediate_size", None)
        or getattr(model, "n_inner", None)
        or (4 * model.hidden_size)
    )
    split = f"{where}.tensor_parallel={tensor}"
    for name, size in (("heads", heads), ("kv_heads", kv_heads), ("ffn_size", inner)):
        if size % tensor:
            raise UserError(f"{split} must divide the model's {name}={size}; choose a divisor")
    if heads // tensor % sequence:
        held = f"the {heads // tensor} heads of a tensor rank" if tensor > 1 else f"{heads} heads"
        raise UserError(
            f"{where}.sequence_parallel={sequence} must divide the model's {held}, which its ranks "
            "share out for attention; choose a divisor"
        )


def _refuse_combinations(config: EngineConfig, where: str) -> None:
    for wrong, sentence in _list_refusals(config):
        if wrong:
            raise UserError(f"{where}.{sentence}")


def _list_refusals(config: EngineConfig) -> Iterable[tuple[bool, str]]:
    """Whether something is wrong, and which key, why, and the remedy."""
    offload, stage = config.offload, config.zero_stage
    tensor, sequence, pipeline = (
        config.tensor_parallel,
        config.sequence_parallel,
        config.pipeline_parallel,
    )
    if config.backend == "torch":
        needs = "needs backend=deepspeed; torch is plain replicas"
        yield tensor > 1, f"tensor_parallel={tensor} {needs}"
        yield sequence > 1, f"sequence_parallel={sequence} {needs}"
        yield offload != "none", f"offload={offload} {needs}"
    yield (
        pipeline > 1 and offload != "none",
        f"offload={offload} cannot be combined with pipeline_parallel={pipeline}; set it to none",
    )
    yield (
        offload == "optimizer" and stage == 0,
        "offload=optimizer moves what ZeRO partitions; set zero_stage to 1, 2 or 3",
    )
    yield (
        offload == "all" and stage != 3,
        f"offload=all moves weights that zero_stage=3 partitions, not zero_stage={stage}; set it "
        "to 3, or offload to optimizer",
    )
    yield (
        tensor > 1 and stage == 3,
        f"tensor_parallel={tensor} cannot be combined with zero_stage=3, which partitions the same "
        "matrices; set zero_stage to 0, 1 or 2",
    )
    yield (
        pipeline > 1 and stage > 1,
        f"pipeline_parallel={pipeline} cannot be combined with zero_stage={stage}: a stage keeps "
        "its weights and gradients over all micro-batches; set zero_stage to 0 or 1",
    )
    yield (
        pipeline > 1 and tensor * sequence > 1,
        f"pipeline_parallel={pipeline} cannot be combined with tensor_parallel={tensor} or "
        f"sequence_parallel={sequence} yet; set them to 1",
    )
