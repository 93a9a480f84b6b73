"""The policy's weights on their way out: gathered a bucket at a time, while the one before travels.

Where ranks share the weights out, a rank that collected all of them first would need room for the
whole model. So they are put together in buckets, on all ranks alike; the first rank hands each
bucket to a thread of its own, which packs, hashes and sends it while the next is gathered.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from raylign.models.adapters import find_adaptation, find_tuner
from raylign.models.folding import fold
from raylign.models.quantization import is_quantized
from raylign.training.engine import Engine

T = TypeVar("T")
Named = tuple[str, torch.Tensor]
_AHEAD = 2  # buckets gathered and not yet taken
_WAIT_S = 0.2


class _Unit:
    """What is gathered together: a parameter, or all of a matrix that is adapted or quantised."""

    def __init__(self, parameters: list[nn.Parameter], read: Callable[[], list[Named]]) -> None:
        self.parameters, self.read = parameters, read
        sizes = (getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters)
        self.bytes = sum(sizes)


def stream_weights(engine: Engine, bucket_bytes: int) -> Iterator[list[Named]]:
    """Weights as `Engine.weights` gives them, in buckets of about `bucket_bytes`. Collective: every
    rank must take all of them.

    What every rank holds whole shares memory with the model; what was gathered is a copy.
    """
    if engine.whole:
        yield from _fill_buckets(engine.weights().items(), bucket_bytes)
        return
    dtype = engine.lm.get_input_embeddings().weight.dtype
    for units in _group(_list_units(engine.lm, "", set()), bucket_bytes):
        parameters = [p for unit in units for p in unit.parameters]
        with _gather(parameters):
            found = [(n, t.detach().to(dtype).clone()) for u in units for n, t in u.read()]
        yield found


def stream_adapter(engine: Engine, bucket_bytes: int) -> Iterator[list[Named]]:
    """The trained adapter alone, by the names that PEFT saves it under. Collective."""
    adaptation = find_adaptation(engine.lm)
    assert adaptation is not None and adaptation.tuner is not None, "there is no adapter"
    from peft import get_peft_model_state_dict

    trained = {f"base_model.model.{name}": t for name, t in engine.exportable().items()}
    saved = get_peft_model_state_dict(adaptation.tuner, state_dict=trained) if trained else {}
    yield from _fill_buckets(saved.items(), bucket_bytes)


def send_beside(buckets: Iterator[list[Named]], send: Callable[[Iterator[Named]], T]) -> T:
    """What `send` makes of all tensors, in a thread that takes buckets as they come; this thread,
    in which collectives belong, makes them. What either raises is raised."""
    ready: queue.Queue[list[Named] | None] = queue.Queue(_AHEAD)
    complete = False

    def take() -> Iterator[Named]:
        while (bucket := ready.get()) is not None:
            yield from bucket
        if not complete:  # or half of the weights would be taken for all of them
            raise RuntimeError("the weights could not be gathered")

    with ThreadPoolExecutor(1, thread_name_prefix="publish") as pool:
        future = pool.submit(lambda: send(take()))
        try:
            for bucket in buckets:
                _put(ready, bucket, future)
            complete = True
        finally:
            _put(ready, None, future)
        return future.result()


def _put(ready: queue.Queue[Any], item: Any, taker: Future[Any]) -> None:
    """Wait for room as long as somebody takes; a sender that failed takes no more."""
    while not taker.done():
        try:
            ready.put(item, timeout=_WAIT_S)
            return
        except queue.Full:
            continue


def _fill_buckets(tensors: Iterable[Named], limit: int) -> Iterator[list[Named]]:
    bucket: list[Named] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach()))
        size += tensor.nbytes
    if bucket:
        yield bucket


def _group(units: Iterable[_Unit], limit: int) -> Iterator[list[_Unit]]:
    bucket: list[_Unit] = []
    size = 0
    for unit in units:
        if bucket and size + unit.bytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(unit)
        size += unit.bytes
    if bucket:
        yield bucket


def _list_units(lm: PreTrainedModel | nn.Module, prefix: str, seen: set[int]) -> Iterator[_Unit]:
    """All weights in the order of `Engine.weights`, tied ones once."""
    if isinstance(lm, find_tuner()) or is_quantized(lm):
        yield _Unit(list(lm.parameters()), lambda: _read_folded(lm, prefix))
        return
    for name, parameter in lm.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield _read_alone(f"{prefix}{name}", parameter)
    for name, child in lm.named_children():
        yield from _list_units(child, f"{prefix}{name}.", seen)


def _read_alone(name: str, parameter: nn.Parameter) -> _Unit:
    return _Unit([parameter], lambda: [(name, parameter)])


def _read_folded(module: nn.Module, prefix: str) -> list[Named]:
    weight, bias = fold(module)
    found = [(f"{prefix}weight", weight)]
    return found if bias is None else [*found, (f"{prefix}bias", bias)]


def _gather(parameters: list[nn.Parameter]) -> Any:
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    from raylign.training.deepspeed_gathering import gather_partitioned

    return gather_partitioned(parameters)
