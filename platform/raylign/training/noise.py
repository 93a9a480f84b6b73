"""Noise on the embeddings of what is learned (NEFTune; Jain et al., 2023, algorithm 1).

What is added to a token is a function of its row's key, its place and the alpha: no state of a
random generator is carried from step to step, and neither micro-batches nor ranks nor the width of
a batch change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingNoise:
    """The noise of a micro-batch."""

    alpha: float
    keys: tuple[int, ...]
    """64 bits for each of B rows."""
    lengths: torch.Tensor
    """int64 [B, T]: tokens of the document that each token is in; 0 for padding."""

    def to(self, device: torch.device) -> EmbeddingNoise:
        """The same noise on `device`."""
        return EmbeddingNoise(self.alpha, self.keys, self.lengths.to(device))


def add_noise(embeddings: torch.Tensor, noise: EmbeddingNoise) -> torch.Tensor:
    """embeddings [B, T, d] plus alpha / sqrt(L d) times uniform numbers of [-1, 1).

    L is the length of the token's own document, which in a packed row is not the row's. Padding
    gets none.
    """
    uniform = torch.stack([_draw(key, embeddings[0]) for key in noise.keys])
    lengths = noise.lengths.to(torch.float32)[..., None]
    size = noise.alpha / (lengths.clamp(min=1) * embeddings.shape[-1]).sqrt()
    return embeddings + (uniform * size * (lengths > 0)).to(embeddings.dtype)


@contextmanager
def noisy(lm: PreTrainedModel, noise: EmbeddingNoise | None) -> Iterator[None]:
    """Within the block what `lm` embeds gets `noise`, if it is in training mode.

    Works on the output of the embedding itself, so it does not matter who calls it, or what an
    adapter puts in front.
    """
    if noise is None or not lm.training:
        yield
        return

    def add(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return add_noise(output, noise)

    handle = lm.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def measure_documents(segments: np.ndarray) -> np.ndarray:
    """int64 [B, T]: tokens of each token's segment, for segments int [B, T]; 0 for padding."""
    lengths = np.zeros(segments.shape, np.int64)
    for row, own in zip(lengths, segments, strict=True):
        row[:] = np.where(own > 0, np.bincount(own)[own], 0)
    return lengths


def gather_noise(alpha: float, keys: Sequence[int], segments: np.ndarray) -> EmbeddingNoise:
    """The noise of rows whose documents are `segments`, int [B, T]."""
    return EmbeddingNoise(alpha, tuple(keys), torch.from_numpy(measure_documents(segments)))


def _draw(key: int, like: torch.Tensor) -> torch.Tensor:
    """Uniform numbers of [-1, 1), float32 [T, d] as `like`: a hash of the key and the place.

    Murmur3's finaliser (Appleby, 2011) twice over a counter, half of the key before each: the same
    numbers on every device, and for a longer row the same and more.
    """
    places = torch.arange(like.numel(), dtype=torch.int32, device=like.device)
    low, high = (int(half) for half in np.array([key], np.uint64).view(np.int32))
    bits = _mix(_mix(places ^ low) ^ high)
    return ((bits >> 8) & 0xFFFFFF).view(like.shape).float() / 2**23 - 1


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """Every bit of an int32 depends on every other; multiplication wraps."""
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        bits = (bits ^ ((bits >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return bits ^ ((bits >> 16) & 0xFFFF)
