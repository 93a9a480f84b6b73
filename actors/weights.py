"""How weights travel from the learner to whoever samples: published once, taken by each.

The learner packs its weights into buckets of bounded size, lays them out through a transport, and
publishes a small manifest: version, checksums, and a *canary* (sequences with the learner's own
log-probs). A rollout worker reads the manifest's buckets, checks them, loads them, and must
reproduce the canary before it serves. Newcomers and restarted workers are ordinary: they take the
current manifest like everyone else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from actors.broadcast import Broadcast
from actors.transports import Ipc, ObjectStore, SharedMemory, Transport
from raylign.training.buckets import Bucket, Place, SyncError, open_bucket, pack_buckets

if TYPE_CHECKING:  # transports alone are used where no model is
    from raylign.inference.generator import Generator

BUCKET_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Canary:
    """Sequences and what the learner makes of them."""

    sequences: tuple[tuple[int, ...], ...]
    logprobs: tuple[np.ndarray, ...]
    """float32 [T] each, temperature 1, entry 0 is 0."""


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What a LoRA adapter is besides its tensors, whose names are PEFT's."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Names of the modules that it adapts, such as `q_proj`."""


@dataclass(frozen=True, slots=True, eq=False)
class WeightManifest:
    """One published policy version."""

    version: int
    buckets: tuple[Bucket, ...]
    canary: Canary
    adapter: AdapterSpec | None = None
    """Given when the tensors are an adapter's, to be applied beside the base; None: all weights."""

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for bucket in self.buckets for tensor in bucket.tensors)

    @property
    def checksum(self) -> str:
        """One checksum over version, kind, and all buckets."""
        parts = [f"{self.version} {self.adapter}", *(b.checksum for b in self.buckets)]
        return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors, in their order."""
        return tuple(tensor.name for bucket in self.buckets for tensor in bucket.tensors)


@dataclass(frozen=True, slots=True)
class SyncProof:
    """What a worker shows before it serves a version."""

    version: int
    checksum: str
    canary_error: float
    """Mean |difference| of canary log-probs to the learner's."""
    start: float
    end: float


def build_transport(
    name: str, *, host: str = "127.0.0.1", on_card: bool = False, deadline_s: float = 120.0
) -> Transport:
    """The learner's side of a transport, by the name that `choose_transport` gave.

    host: where workers reach this process; on_card: NCCL in place of gloo; deadline_s: of a worker
    that receives. The last three are for broadcast.
    """
    if name == "broadcast":
        return Broadcast(host, on_card=on_card, deadline_s=deadline_s)
    if name == "shared_memory":
        return SharedMemory()
    return Ipc() if name == "ipc" else ObjectStore()


def publish_weights(
    version: int,
    tensors: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor],
    canary: Canary,
    transport: Transport | None = None,
    *,
    limit: int = BUCKET_BYTES,
    adapter: AdapterSpec | None = None,
) -> WeightManifest:
    """Lay out `tensors` as policy `version`; through the object store without a `transport`.

    Tensors are taken one at a time, each read before the next is asked for, in buckets of at most
    `limit` bytes; a finished bucket is on its way while the next is gathered. Give `adapter` when
    the tensors are an adapter's alone. Raises `UserError` when the transport has no room.
    """
    named = tensors.items() if isinstance(tensors, Mapping) else tensors
    transport = ObjectStore() if transport is None else transport
    transport.begin(version)
    for packed in pack_buckets(version, named, limit, transport.room):
        transport.lay(packed)
    return WeightManifest(version, transport.finish(), canary, adapter)


def receive_weights(
    manifest: WeightManifest, worker: str = "worker"
) -> Iterator[tuple[str, torch.Tensor]]:
    """The published tensors, proved bucket by bucket. They are read-only views, good until the
    iterator ends; `worker` is what the learner calls the reader in its errors.

    Raises `SyncError` that says what is wrong with which version: bytes or a layout that are not
    what was published, a learner that is gone, or a version that was overwritten by a later one.
    """
    buckets = manifest.buckets
    try:
        sources = buckets[0].handle.take(manifest.version, buckets, worker) if buckets else ()
        for index, (bucket, data) in enumerate(zip(buckets, sources, strict=True)):
            place = Place(manifest.version, index, last=index == len(buckets) - 1)
            yield from open_bucket(data, bucket.checksum, bucket.tensors, place)
    except SyncError as error:
        raise SyncError(f"weights of version {manifest.version}: {error}") from None


def adopt_weights(
    generator: Generator, manifest: WeightManifest, tolerance: float, worker: str = "worker"
) -> float:
    """Load a published version into `generator` and prove it.

    Returns the canary error; raises `SyncError` if it exceeds `tolerance` or the bytes are wrong.
    """
    tensors = receive_weights(manifest, worker)
    if manifest.adapter is None:
        generator.load_weights(manifest.version, tensors)
    else:
        _load_adapter(generator, manifest, manifest.adapter, tensors)
    return prove_weights(generator, manifest, tolerance)


def prove_weights(generator: Generator, manifest: WeightManifest, tolerance: float) -> float:
    """The canary error of the weights that `generator` has. Raises `SyncError` above
    `tolerance`, and where another version is being served."""
    served = getattr(generator, "version", manifest.version)
    if served != manifest.version:
        raise SyncError(f"the generator serves version {served}, not {manifest.version}")
    error = canary_error(generator.score(manifest.canary.sequences), manifest.canary.logprobs)
    if not error <= tolerance:
        raise SyncError(
            f"version {manifest.version} fails its canary: mean |logprob difference| to the "
            f"learner is {error:.3g}, above {tolerance:.3g}"
        )
    return error


def _load_adapter(
    generator: Generator,
    manifest: WeightManifest,
    adapter: AdapterSpec,
    tensors: Iterator[tuple[str, torch.Tensor]],
) -> None:
    load = getattr(generator, "load_adapter", None)
    if load is None:
        raise SyncError(
            f"version {manifest.version} is an adapter, and {type(generator).__name__} serves "
            "whole weights; set transfer.adapter_only: false"
        )
    load(manifest.version, tensors, adapter.rank, adapter.alpha, adapter.targets)


def canary_error(own: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Mean absolute difference over all tokens but each sequence's first; 0.0 without tokens."""
    differences = [np.abs(a[1:] - b[1:]) for a, b in zip(own, expected, strict=True)]
    flat = np.concatenate(differences) if differences else np.zeros(0)
    return float(flat.mean()) if len(flat) else 0.0
