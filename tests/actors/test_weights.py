"""Weights travel bit for bit, in bounded buckets, and damage is noticed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.weights import (
    ALIGNMENT,
    Canary,
    SyncError,
    adopt_weights,
    canary_error,
    pack_weights,
    publish_weights,
    pull_weights,
)

WEIGHTS = {
    "embedding": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "norm": torch.ones(3, dtype=torch.bfloat16),
    "head": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)),
    "scalar": torch.tensor(2.5),
}
NO_CANARY = Canary((), ())


def test_buckets_are_bounded_aligned_and_complete() -> None:
    packed = pack_weights(WEIGHTS, limit=128)
    names = [spec.name for _, specs in packed for spec in specs]
    assert names == list(WEIGHTS)
    for data, specs in packed:
        assert len(data) <= 128 or len(specs) == 1
        assert all(spec.offset % ALIGNMENT == 0 for spec in specs)
        assert sum(spec.bytes for spec in specs) <= len(data)


def test_a_tensor_larger_than_the_limit_has_a_bucket_to_itself() -> None:
    packed = pack_weights({"a": torch.zeros(2), "big": torch.zeros(100), "b": torch.zeros(2)}, 64)
    assert [[s.name for s in specs] for _, specs in packed] == [["a"], ["big"], ["b"]]


@pytest.mark.parametrize("limit", [16, 128, 1 << 20])
def test_pulled_weights_equal_published_ones(ray_cluster: None, limit: int) -> None:
    manifest = publish_weights(3, WEIGHTS, NO_CANARY, limit)
    pulled = dict(pull_weights(manifest))
    assert list(pulled) == list(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert pulled[name].dtype == tensor.dtype and pulled[name].shape == tensor.shape
        assert torch.equal(pulled[name], tensor)
    assert manifest.bytes == sum(t.nbytes for t in WEIGHTS.values())


def test_the_checksum_depends_on_every_bit(ray_cluster: None) -> None:
    other = {**WEIGHTS, "scalar": torch.tensor(2.5000002)}
    assert (
        publish_weights(1, WEIGHTS, NO_CANARY).checksum
        != publish_weights(1, other, NO_CANARY).checksum
    )


def test_damaged_bytes_are_refused(ray_cluster: None) -> None:
    manifest = publish_weights(1, WEIGHTS, NO_CANARY)
    wrong = replace(manifest.buckets[0], checksum="0" * 32)
    with pytest.raises(SyncError, match="arrived damaged"):
        list(pull_weights(replace(manifest, buckets=(wrong,))))


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


def test_stale_weights_fail_the_canary(ray_cluster: None) -> None:
    canary = Canary(((1, 2, 3),), (np.array([0.0, -1.0, -2.0], np.float32),))
    manifest = publish_weights(1, WEIGHTS, canary)
    with pytest.raises(SyncError, match="fails its canary"):
        adopt_weights(_Deaf(), manifest, tolerance=0.1)  # type: ignore[arg-type]
    assert adopt_weights(_Deaf(), manifest, tolerance=2.0) == pytest.approx(1.5)  # type: ignore[arg-type]
