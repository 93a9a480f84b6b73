"""Weights travel bit for bit, in bounded buckets, and damage is noticed on every transport."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from actors import transports
from actors.transports import SharedMemory, Transport, choose_transport
from actors.weights import (
    AdapterSpec,
    Canary,
    WeightManifest,
    adopt_weights,
    build_transport,
    canary_error,
    publish_weights,
    receive_weights,
)
from raylign.config import UserError
from raylign.training.buckets import ALIGNMENT, Place, SyncError, open_bucket, pack_buckets

WEIGHTS = {
    "embedding": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "norm": torch.ones(3, dtype=torch.bfloat16),
    "head": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)),
    "scalar": torch.tensor(2.5),
}
NO_CANARY = Canary((), ())
LOCAL = ("shared_memory", "broadcast")


@pytest.fixture(params=["object_store", *LOCAL])
def transport(request: pytest.FixtureRequest) -> Iterator[Transport]:
    if request.param == "object_store":
        request.getfixturevalue("ray_cluster")
    built = build_transport(request.param, deadline_s=8)
    yield built
    built.close()


def room(size: int) -> torch.Tensor:
    return torch.full((size,), 255, dtype=torch.uint8)


def pack(weights: dict[str, torch.Tensor], limit: int) -> list[Any]:
    return list(pack_buckets(1, weights.items(), limit, room))


def test_buckets_are_bounded_aligned_and_complete() -> None:
    packed = pack(WEIGHTS, 256)
    names = [spec.name for bucket in packed for spec in bucket.tensors]
    assert names == list(WEIGHTS) and len(packed) == 2
    for bucket in packed:
        assert len(bucket.data) <= 256
        assert all(spec.offset % ALIGNMENT == 0 for spec in bucket.tensors)


def test_a_tensor_larger_than_the_limit_has_a_bucket_to_itself() -> None:
    packed = pack({"a": torch.zeros(2), "big": torch.zeros(100), "b": torch.zeros(2)}, 64)
    assert [[s.name for s in bucket.tensors] for bucket in packed] == [["a"], ["big"], ["b"]]


def test_a_tensor_is_read_before_the_next_is_asked_for() -> None:
    shared = torch.zeros(4)

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for value in range(3):
            yield f"t{value}", shared.fill_(value)

    (bucket,) = pack_buckets(0, gather(), 1 << 10, room)
    views = open_bucket(bucket.data, bucket.checksum, bucket.tensors, Place(0, 0, last=True))
    assert [tensor.tolist() for _, tensor in views] == [[v] * 4 for v in range(3)]


def test_pieces_and_strides_change_neither_bytes_nor_checksum() -> None:
    large = torch.randn(700_000, generator=torch.Generator().manual_seed(1)).reshape(700, 1000)
    (whole,), (strided,) = pack({"t": large}, 1), pack({"t": large.T.contiguous().T}, 1)
    assert whole.checksum == strided.checksum
    assert torch.equal(whole.data[: large.nbytes], large.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("limit", [16, 256, 1 << 20])
def test_received_weights_equal_published_ones(transport: Transport, limit: int) -> None:
    for version in (3, 4, 5):  # the third is laid out where the first was
        weights = {name: tensor + version for name, tensor in WEIGHTS.items()}
        manifest = publish_weights(version, weights.items(), NO_CANARY, transport, limit=limit)
        received = dict(receive_weights(manifest))
        assert list(received) == list(weights) == list(manifest.names)
        for name, tensor in weights.items():
            assert received[name].dtype == tensor.dtype and received[name].shape == tensor.shape
            assert torch.equal(received[name], tensor)
        assert manifest.bytes == sum(t.nbytes for t in weights.values())


def test_the_checksum_depends_on_every_bit_and_the_version() -> None:
    local = SharedMemory()
    other = {**WEIGHTS, "scalar": torch.tensor(2.5000002)}
    manifests = [
        publish_weights(version, weights, NO_CANARY, local)
        for version, weights in ((1, WEIGHTS), (1, other), (2, WEIGHTS))
    ]
    assert len({m.checksum for m in manifests}) == len({m.buckets[0].checksum for m in manifests})
    assert len({m.checksum for m in manifests}) == 3


def flip_checksum(manifest: WeightManifest) -> WeightManifest:
    first = replace(manifest.buckets[0], checksum="0" * 32)
    return replace(manifest, buckets=(first, *manifest.buckets[1:]))


def drop_bucket(manifest: WeightManifest) -> WeightManifest:
    return replace(manifest, buckets=manifest.buckets[:-1])


def drop_tensor(manifest: WeightManifest) -> WeightManifest:
    first = manifest.buckets[0]
    first = replace(first, tensors=first.tensors[:-1])
    return replace(manifest, buckets=(first, *manifest.buckets[1:]))


def respecify(**changes: Any) -> Callable[[WeightManifest], WeightManifest]:
    def change(manifest: WeightManifest) -> WeightManifest:
        first = manifest.buckets[0]
        spec = replace(first.tensors[0], **changes)
        first = replace(first, tensors=(spec, *first.tensors[1:]))
        return replace(manifest, buckets=(first, *manifest.buckets[1:]))

    return change


DAMAGES: dict[str, tuple[Callable[[WeightManifest], WeightManifest], str]] = {
    "bytes": (flip_checksum, "arrived damaged: .*embedding"),
    "no last bucket": (drop_bucket, "arrived damaged: .*embedding"),
    "no tensor": (drop_tensor, "arrived damaged: .*embedding"),
    "shape": (respecify(shape=(6, 4)), "arrived damaged: .*embedding"),
    "more rows": (respecify(shape=(5, 6)), r"embedding: 96 bytes are no float32 \(5, 6\)"),
    "type": (respecify(dtype="int32"), "arrived damaged: .*embedding"),
    "no type": (respecify(dtype="Tensor"), "embedding: 96 bytes are no Tensor"),
    "name": (respecify(name="other"), "arrived damaged: .*other"),
    "truncated": (respecify(bytes=10**6), "embedding is truncated"),
    "version": (lambda m: replace(m, version=2), "of version 2: "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name_on_every_transport(transport: Transport, damage: str) -> None:
    manifest = publish_weights(1, WEIGHTS, NO_CANARY, transport, limit=256)
    change, message = DAMAGES[damage]
    with pytest.raises(SyncError, match=message):
        list(receive_weights(change(manifest)))
    assert list(dict(receive_weights(manifest))) == list(WEIGHTS)  # and the next is served


@pytest.mark.parametrize("name", LOCAL)
def test_a_flipped_byte_is_refused_before_its_bucket_is_read(name: str) -> None:
    local: Any = build_transport(name, deadline_s=8)
    manifest = publish_weights(1, WEIGHTS, NO_CANARY, local, limit=256)
    laid = local._sets[1] if name == "broadcast" else local._arenas[0]._pages._segments.values()
    memory = list(laid)[1]
    memory[9] ^= 1
    taken = []
    with pytest.raises(SyncError, match=r"version 1: arrived damaged: .* starts with head"):
        taken.extend(name for name, _ in receive_weights(manifest))
    assert taken == ["embedding", "norm"]
    local.close()


def test_a_reader_of_what_is_being_overwritten_is_told_so() -> None:
    local = SharedMemory()
    first = publish_weights(1, WEIGHTS, NO_CANARY, local, limit=256)
    reading = receive_weights(first)
    next(reading)
    second = publish_weights(2, WEIGHTS, NO_CANARY, local, limit=256)
    next(reading)  # the next version lies elsewhere
    publish_weights(3, WEIGHTS, NO_CANARY, local, limit=256)
    with pytest.raises(SyncError, match="version 1: its memory holds version 3 now"):
        list(reading)
    local.begin(4)
    with pytest.raises(SyncError, match="version 2: its memory holds a later version now"):
        list(receive_weights(second))


LEARNER = """
import pickle, sys, torch
from actors.transports import SharedMemory
from actors.weights import Canary, publish_weights
local = SharedMemory()
manifest = publish_weights(7, {"w": torch.arange(1000.0)}, Canary((), ()), local)
print(pickle.dumps(manifest).hex(), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_shared_memory_ends_with_the_killed_learner_and_its_readers() -> None:
    before = set(os.listdir("/dev/shm"))
    learner = subprocess.Popen(
        [sys.executable, "-c", LEARNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert learner.stdout is not None
    manifest = pickle.loads(bytes.fromhex(learner.stdout.readline().decode()))
    (_, tensor), *_ = receive_weights(manifest)
    learner.kill()
    learner.wait()
    assert torch.equal(tensor, torch.arange(1000.0))  # who has it open keeps it
    transports._open_arena.cache_clear()
    with pytest.raises(SyncError, match=rf"version 7: .* \(process {learner.pid}\) .* is gone"):
        list(receive_weights(manifest))
    assert set(os.listdir("/dev/shm")) <= before
    assert _shares_memory()  # `tensor` holds it
    del tensor
    assert not _shares_memory()


def _shares_memory() -> bool:
    gc.collect()
    return "memfd:raylign-weights" in Path("/proc/self/maps").read_text()


def test_no_room_to_share_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "_free_memory", lambda: 10 << 20)
    with pytest.raises(UserError, match=r"needs 64 MiB and 10 MiB are free; lower transfer.bucket"):
        publish_weights(1, WEIGHTS, NO_CANARY, SharedMemory())
    monkeypatch.undo()
    assert 0 < transports._free_memory() <= psutil.virtual_memory().total


CARDS = {"learner_on_card": True, "workers_on_cards": True}
NO_CARDS = {"learner_on_card": False, "workers_on_cards": False}


def test_auto_chooses_by_where_learner_and_workers_are() -> None:
    def auto(cards: dict[str, bool], same_card: bool, one_machine: bool) -> str:
        return choose_transport("auto", **cards, same_card=same_card, one_machine=one_machine)

    assert auto(CARDS, True, True) == "ipc"
    assert auto(CARDS, False, True) == auto(CARDS, False, False) == "broadcast"
    assert auto(NO_CARDS, False, True) == "shared_memory"
    assert auto(NO_CARDS, False, False) == "object_store"


@pytest.mark.parametrize("wanted", ["ipc", "shared_memory"])
def test_a_transport_that_cannot_reach_is_refused(wanted: str) -> None:
    with pytest.raises(UserError, match=f"transfer.transport={wanted} needs .*; use auto"):
        choose_transport(wanted, **NO_CARDS, same_card=False, one_machine=False)
    assert choose_transport("broadcast", **NO_CARDS, same_card=False, one_machine=False)


def test_canary_error_skips_the_first_token_which_nothing_predicts() -> None:
    own = [np.array([9.0, 1.0, 2.0]), np.array([9.0, 4.0])]
    expected = [np.array([0.0, 1.5, 2.0]), np.array([0.0, 3.0])]
    assert canary_error(own, expected) == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert canary_error([], []) == 0.0


class _Deaf:
    """A generator that ignores new weights: the failure the canary exists for."""

    def load_weights(self, version: int, tensors: object) -> None:
        list(tensors)  # type: ignore[call-overload]

    def score(self, sequences: list[tuple[int, ...]]) -> list[np.ndarray]:
        return [np.zeros(len(s), np.float32) for s in sequences]


CANARY = Canary(((1, 2, 3),), (np.array([0.0, -1.0, -2.0], np.float32),))


def test_stale_weights_fail_the_canary_on_every_transport(transport: Transport) -> None:
    deaf: Any = _Deaf()
    manifest = publish_weights(1, WEIGHTS, CANARY, transport)
    with pytest.raises(SyncError, match=r"version 1 fails its canary: .* is 1.5, above 0.1"):
        adopt_weights(deaf, manifest, tolerance=0.1)
    assert adopt_weights(deaf, manifest, tolerance=2.0) == pytest.approx(1.5)
    wrong = replace(CANARY, logprobs=(np.array([0.0, np.nan, -2.0], np.float32),))
    with pytest.raises(SyncError, match="fails its canary"):
        adopt_weights(deaf, replace(manifest, canary=wrong), tolerance=2.0)


def test_a_generator_that_serves_another_version_fails() -> None:
    deaf: Any = _Deaf()
    deaf.version = 3
    local = SharedMemory()
    manifest = publish_weights(4, WEIGHTS, CANARY, local)
    with pytest.raises(SyncError, match="serves version 3, not 4"):
        adopt_weights(deaf, manifest, tolerance=9.0)


class _Adapting(_Deaf):
    """A generator that takes adapters."""

    def load_adapter(self, version: int, tensors: object, *shape: object) -> None:
        self.taken = (version, dict(tensors), shape)  # type: ignore[call-overload]


def test_an_adapter_goes_to_generators_that_take_one() -> None:
    local, adapting = SharedMemory(), _Adapting()
    tensors = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4)}
    spec = AdapterSpec(2, 4.0, ("q_proj",))
    manifest = publish_weights(1, tensors, CANARY, local, adapter=spec)
    adopt_weights(adapting, manifest, tolerance=2.0)  # type: ignore[arg-type]
    version, taken, shape = adapting.taken
    assert version == 1 and list(taken) == list(tensors) and shape == (2, 4.0, ("q_proj",))
    with pytest.raises(SyncError, match="an adapter, and _Deaf serves whole weights; set transfer"):
        adopt_weights(_Deaf(), manifest, tolerance=2.0)  # type: ignore[arg-type]
    whole = replace(manifest, adapter=None)
    assert whole.checksum != manifest.checksum
