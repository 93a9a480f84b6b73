"""New weights in a vLLM model on a CPU, straight from where they were received.

vLLM's CPU layers keep a copy of their weight that oneDNN packed, and forget the weight itself. Its
general reload builds every layer anew: fresh memory, a copy, the packing, a second copy, and the
embedding packed too, which nothing multiplies by. Here a layer is packed from the received bytes,
into the memory that the old copy gave back; the results are the same to the bit. Models whose
weights need more than being joined and packed are left to vLLM.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from raylign.training.buckets import SyncError

# Their weights have the names of Hugging Face's, some side by side in one, and nothing else is done
# to them. (GPT-2's, for one, are transposed.)
_PLAIN_MODELS = {
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
}
_PLAIN_METHODS = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"}
_MALLOC = {"M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_MMAP_THRESHOLD": (-3, 2**30)}


@dataclass(slots=True, eq=False)
class _Linear:
    """A layer that keeps nothing but its packed weight."""

    module: Any
    rows: tuple[int, ...]
    parts: list[torch.Tensor | None]

    def put(self, place: int, tensor: torch.Tensor, staging: _Staging) -> None:
        self.parts[place] = tensor
        if any(part is None for part in self.parts):
            return
        weight = staging.join([p for p in self.parts if p is not None], self.module.weight.dtype)
        self.parts = [None] * len(self.rows)
        empty = self.module.weight
        self.module.weight = torch.nn.Parameter(weight, requires_grad=False)
        _pack(self.module)
        if self.module.weight.numel():
            raise RuntimeError(f"{type(self.module).__name__} was not packed; use vLLM's reload")
        self.module.weight = empty


@dataclass(frozen=True, slots=True)
class _Target:
    """Where one tensor goes."""

    shape: tuple[int, ...]
    linear: _Linear | None
    place: int
    parameter: torch.Tensor | None
    start: int = 0


class _Staging:
    """Memory to join tensors in, kept from sync to sync."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int], torch.Tensor] = {}

    def join(self, parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """[sum of rows, columns] in `dtype`; of parts that lie side by side already, a view."""
        rows, columns = sum(len(part) for part in parts), parts[0].shape[1]
        if all(part.dtype == dtype for part in parts) and _adjacent(parts):
            return parts[0].as_strided((rows, columns), (columns, 1))
        if (rows, columns) not in self._buffers:
            self._buffers[rows, columns] = torch.empty(rows, columns, dtype=dtype)
        joined = self._buffers[rows, columns]
        start = 0
        for part in parts:
            joined[start : start + len(part)].copy_(part)
            start += len(part)
        return joined


class WeightPlan:
    """Where each weight of a checkpoint goes in one model that is being served."""

    def __init__(self, targets: dict[str, _Target], heads: list[Any]) -> None:
        self._targets, self._heads = targets, heads
        self._staging = _Staging()
        _keep_freed_memory()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the weights that a load must bring."""
        return tuple(self._targets)

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights. Tensors need not outlive the iteration, but each must stay until
        those that are joined with it have come.

        Raises `SyncError` for a tensor that the model does not have, has in another shape, or gets
        twice, and when one is missing; the model must not serve then.
        """
        missing = dict(self._targets)
        for name, tensor in tensors:
            target = missing.pop(name, None)
            if target is None:
                raise SyncError(f"{name} is no weight of the served model, or came twice")
            if tuple(tensor.shape) != target.shape:
                raise SyncError(f"{name} is {tuple(tensor.shape)}, and was {target.shape}")
            if target.linear is not None:
                target.linear.put(target.place, tensor, self._staging)
            elif target.parameter is not None:
                rows = slice(target.start, target.start + len(tensor))
                target.parameter[rows].copy_(tensor)
        if missing:
            raise SyncError(f"{len(missing)} weights did not come, the first {next(iter(missing))}")
        for head in self._heads:
            _pack(head)


def plan_weights(model: torch.nn.Module) -> WeightPlan | None:
    """The plan for a vLLM model that was loaded on a CPU; None where only vLLM's own reload is
    known to be right: another device, architecture, quantisation, or more than one rank."""
    if type(model).__name__ not in _PLAIN_MODELS:
        return None
    fused = {name: tuple(parts) for name, parts in _packed_names(model)}
    targets: dict[str, _Target] = {}
    heads = []
    shared = {id(getattr(model, "lm_head", None))}
    for path, module in model.named_modules(remove_duplicate=True):
        if not dict(module.named_parameters(recurse=False)):
            continue
        found = _plan_module(path, module, fused)
        if found is None:
            return None
        is_head = id(module) in shared or _is_a(module, "ParallelLMHead")
        tied = is_head and any(module.weight is t.parameter for t in targets.values())
        if not tied:
            targets.update(found)
        if is_head and hasattr(module, "cpu_linear"):
            heads.append(module)
        elif _is_a(module, "VocabParallelEmbedding"):
            # Only looked up in; its packed copy is as large as itself.
            module.cpu_linear = functional.linear
    return WeightPlan(targets, heads)


def _plan_module(
    path: str, module: Any, fused: dict[str, tuple[str, ...]]
) -> dict[str, _Target] | None:
    parameters = dict(module.named_parameters(recurse=False))
    method = type(getattr(module, "quant_method", None)).__name__
    parent, _, own = path.rpartition(".")
    if (
        any(p.device.type != "cpu" for p in parameters.values())
        or getattr(module, "tp_size", 1) > 1
    ):
        return None
    if _is_a(module, "VocabParallelEmbedding"):
        shape = (module.org_vocab_size, module.weight.shape[1])
        known = method in _PLAIN_METHODS and set(parameters) == {"weight"}
        return {f"{path}.weight": _Target(shape, None, 0, module.weight)} if known else None
    if not hasattr(module, "cpu_linear"):
        if not _is_a(module, "RMSNorm"):
            return None
        return {f"{path}.{n}": _Target(tuple(p.shape), None, 0, p) for n, p in parameters.items()}
    if method not in _PLAIN_METHODS or module.weight.numel():
        return None
    names = fused.get(own, (own,))
    rows = tuple(module.output_partition_sizes) if len(names) > 1 else (module.output_size,)
    if len(rows) != len(names) or set(parameters) - {"weight", "bias"}:
        return None
    linear = _Linear(module, rows, [None] * len(rows))
    targets: dict[str, _Target] = {}
    for place, (name, count) in enumerate(zip(names, rows, strict=True)):
        full = f"{parent}.{name}" if parent else name
        targets[f"{full}.weight"] = _Target((count, module.input_size), linear, place, None)
        if parameters.get("bias") is not None:
            start = sum(rows[:place])
            targets[f"{full}.bias"] = _Target((count,), None, 0, module.bias, start)
    return targets


def _packed_names(model: Any) -> Iterator[tuple[str, list[str]]]:
    yield from getattr(model, "packed_modules_mapping", {}).items()


def _pack(module: Any) -> None:
    module.cpu_linear = None  # the old copy's memory is free before the new one asks for it
    module.quant_method.process_weights_after_loading(module)


def _adjacent(parts: list[torch.Tensor]) -> bool:
    storage, end = parts[0].untyped_storage().data_ptr(), parts[0].data_ptr()
    for part in parts:
        other = part.untyped_storage().data_ptr() != storage
        if other or part.data_ptr() != end or not part.is_contiguous():
            return False
        end += part.nbytes
    return True


def _is_a(module: Any, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(module).__mro__)


def _keep_freed_memory() -> None:
    """Large blocks that are freed at one sync serve the next: asked from the system again, each
    page of them would be cleared and mapped anew, at several times the cost of the packing. (glibc;
    other C libraries are left as they are.)"""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _MALLOC.values():
            mallopt(option, value)


def place_adapter(
    manager: Any, form: Any, number: int, tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Make `tensors` the LoRA adapter `number` of a vLLM worker, in place of the last, from memory.

    manager: the worker's `model_runner.lora_manager`; form: vLLM's `PEFTHelper` with the adapter's
    rank, alpha and targets. Requests name the adapter by a `LoRARequest` of that number. Raises
    `SyncError` where rank, targets and tensors do not belong together, or the engine was started
    for smaller ranks; the adapter must not serve then.
    """
    most = manager.lora_config.max_lora_rank
    if form.r > most:
        raise SyncError(f"the adapter's rank is {form.r}, and the engine holds up to {most}")
    taken: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        sides = {"lora_A": 0, "lora_B": 1}
        if kind not in sides or module.rpartition(".")[2] not in form.target_modules:
            raise SyncError(f"{name} is no part of an adapter of {', '.join(form.target_modules)}")
        if tensor.ndim != 2 or tensor.shape[sides[kind]] != form.r:
            raise SyncError(f"{name} is {tuple(tensor.shape)}, which is not of rank {form.r}")
        taken[name] = tensor.detach().clone()  # it outlives what it was received in
    halves = {name.replace(".lora_B", ".lora_A") for name in taken}
    lone = next((n for n in halves if not {n, n.replace(".lora_A", ".lora_B")} <= set(taken)), None)
    if lone is not None or not taken:
        raise SyncError(f"of the adapter's {lone or 'tensors'} one half or all did not come")
    served = manager._adapter_manager
    mapper = getattr(served.model, "hf_to_vllm_mapper", None)
    adapter = manager._lora_model_cls.from_lora_tensors(
        lora_model_id=number,
        tensors=taken,
        peft_helper=form,
        device=str(manager.device),
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    served.remove_adapter(number)
    served.add_adapter(adapter)
    served.activate_adapter(number)
