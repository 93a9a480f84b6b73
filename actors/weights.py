"""How weights travel from the learner to whoever samples: published once, pulled by each.

The learner packs its weights into buckets of bounded size in the object store and publishes a
small manifest: version, checksums, and a *canary* (sequences with the learner's own log-probs). A
rollout worker pulls the manifest's buckets, checks them, loads them, and must reproduce the canary
before it serves. Pulling makes newcomers and restarted workers ordinary: they take the current
manifest like everyone else.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import ray
import torch
import xxhash

from raylign.inference.generator import Generator

BUCKET_BYTES = 64 << 20
ALIGNMENT = 16  # of each tensor in its bucket, so that it can be viewed as any type


class SyncError(RuntimeError):
    """A worker's weights are not what the learner published; it must not serve."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where a tensor lies inside its bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """One object of the store: concatenated tensors, uint8."""

    ref: ray.ObjectRef
    checksum: str
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Canary:
    """Sequences and what the learner makes of them."""

    sequences: tuple[tuple[int, ...], ...]
    logprobs: tuple[np.ndarray, ...]
    """float32 [T] each, temperature 1, entry 0 is 0."""


@dataclass(frozen=True, slots=True, eq=False)
class WeightManifest:
    """One published policy version."""

    version: int
    buckets: tuple[Bucket, ...]
    canary: Canary

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for bucket in self.buckets for tensor in bucket.tensors)

    @property
    def checksum(self) -> str:
        """One checksum over all buckets."""
        return xxhash.xxh3_128_hexdigest("".join(b.checksum for b in self.buckets).encode())


@dataclass(frozen=True, slots=True)
class SyncProof:
    """What a worker shows before it serves a version."""

    version: int
    checksum: str
    canary_error: float
    """Mean |difference| of canary log-probs to the learner's."""
    start: float
    end: float


def pack_weights(
    weights: Mapping[str, torch.Tensor], limit: int = BUCKET_BYTES
) -> list[tuple[np.ndarray, tuple[TensorSpec, ...]]]:
    """Concatenate tensors in order into uint8 arrays of at most `limit` bytes (a larger tensor
    has one to itself)."""
    packed: list[tuple[np.ndarray, tuple[TensorSpec, ...]]] = []
    pieces: list[np.ndarray] = []
    specs: list[TensorSpec] = []
    size = 0
    for name, tensor in weights.items():
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        raw = np.pad(raw, (0, -len(raw) % ALIGNMENT))
        if pieces and size + len(raw) > limit:
            packed.append((np.concatenate(pieces), tuple(specs)))
            pieces, specs, size = [], [], 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name, dtype, tuple(tensor.shape), size, tensor.nbytes))
        pieces.append(raw)
        size += len(raw)
    if pieces:
        packed.append((np.concatenate(pieces), tuple(specs)))
    return packed


def publish_weights(
    version: int, weights: Mapping[str, torch.Tensor], canary: Canary, limit: int = BUCKET_BYTES
) -> WeightManifest:
    """Put `weights` into the object store as policy `version`."""
    buckets = [
        Bucket(ray.put(data), xxhash.xxh3_128_hexdigest(data.data), specs)
        for data, specs in pack_weights(weights, limit)
    ]
    return WeightManifest(version, tuple(buckets), canary)


def pull_weights(manifest: WeightManifest) -> Iterator[tuple[str, torch.Tensor]]:
    """The published tensors, a bucket at a time. Raises `SyncError` on a checksum mismatch."""
    for bucket in manifest.buckets:
        data = ray.get(bucket.ref)
        found = xxhash.xxh3_128_hexdigest(data)
        if found != bucket.checksum:
            raise SyncError(
                f"weights of version {manifest.version} arrived damaged: checksum {found} "
                f"of the bucket that starts with {bucket.tensors[0].name}, not {bucket.checksum}"
            )
        with warnings.catch_warnings():
            # The store's memory is read-only, and so is our use of it.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            flat = torch.from_numpy(data)
        for spec in bucket.tensors:
            raw = flat[spec.offset : spec.offset + spec.bytes]
            yield spec.name, raw.view(getattr(torch, spec.dtype)).view(spec.shape)


def adopt_weights(generator: Generator, manifest: WeightManifest, tolerance: float) -> float:
    """Load a published version into `generator` and prove it.

    Returns the canary error; raises `SyncError` if it exceeds `tolerance` or the bytes are wrong.
    """
    generator.load_weights(manifest.version, pull_weights(manifest))
    error = canary_error(generator.score(manifest.canary.sequences), manifest.canary.logprobs)
    if not error <= tolerance:
        raise SyncError(
            f"version {manifest.version} fails its canary: mean |logprob difference| to the "
            f"learner is {error:.3g}, above {tolerance:.3g}"
        )
    return error


def canary_error(own: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Mean absolute difference over all tokens but each sequence's first; 0.0 without tokens."""
    differences = [np.abs(a[1:] - b[1:]) for a, b in zip(own, expected, strict=True)]
    flat = np.concatenate(differences) if differences else np.zeros(0)
    return float(flat.mean()) if len(flat) else 0.0
