"""Noise on embeddings: its size, and that nothing but row, place and key decides it."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from raylign.models.loading import load_model
from raylign.training.noise import EmbeddingNoise, add_noise, gather_noise, measure_documents
from raylign.training.objectives import LanguageObjective, embed_batch
from raylign.training.rows import TextRows

SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> PreTrainedModel:
    return load_model(tiny_model)


def draw(keys: tuple[int, ...], segments: np.ndarray, width: int, alpha: float) -> torch.Tensor:
    zeros = torch.zeros(*segments.shape, width)
    return add_noise(zeros, gather_noise(alpha, keys, segments))


def test_a_document_is_as_long_as_its_segment() -> None:
    assert measure_documents(SEGMENTS).tolist() == [
        [3, 3, 3, 2, 2, 0],
        [6, 6, 6, 6, 6, 6],
        [1, 0, 0, 0, 0, 0],
    ]


def test_size_is_the_paper_s_and_padding_has_none() -> None:
    noise = draw((1, 2, 3), SEGMENTS, 500, alpha=5.0)
    lengths = measure_documents(SEGMENTS)
    for row, place in np.ndindex(*SEGMENTS.shape):
        found, length = noise[row, place], int(lengths[row, place])
        if not length:
            assert not found.any()
            continue
        bound = 5.0 / math.sqrt(length * 500)
        assert 0.97 * bound < found.abs().max() <= 1.00001 * bound
        assert abs(found.mean()) < 4 * bound / math.sqrt(3 * 500)
        assert found.std() == pytest.approx(bound / math.sqrt(3), rel=0.12)


def test_numbers_are_uniform_and_do_not_repeat() -> None:
    one = np.ones((1, 1000), np.int64)
    scale = 1 / math.sqrt(1000 * 100)
    first, second = (draw((key,), one, 100, 1.0).flatten() / scale for key in (5, 6))
    counts = torch.histc(first, bins=10, min=-1, max=1)
    assert ((counts - 10_000).abs() < 500).all(), "five standard deviations"
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.016
    assert abs(torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1]) < 0.016
    assert len(torch.unique(first)) > 99_000


def test_other_rows_and_the_width_of_the_batch_change_nothing() -> None:
    together = draw((7, 8), SEGMENTS[:2], 16, 2.0)
    assert torch.equal(draw((8,), SEGMENTS[1:2], 16, 2.0)[0], together[1])
    wider = np.pad(SEGMENTS[:1], ((0, 0), (0, 9)))
    assert torch.equal(draw((7,), wider, 16, 2.0)[0, :6], together[0])
    half = add_noise(
        torch.zeros(1, 6, 16, dtype=torch.bfloat16), gather_noise(2.0, (7,), SEGMENTS[:1])
    )
    assert half.dtype is torch.bfloat16
    assert torch.equal(half[0], together[0].bfloat16())


def take_steps(lm: PreTrainedModel, cuts: list[slice], **options: float) -> torch.Tensor:
    """The gradient of the embedding from the micro-batches of step 3."""
    tokens = np.arange(4, 22).reshape(3, 6)
    whole = TextRows(tokens, SEGMENTS, (SEGMENTS > 0) & (np.arange(6) > 0))
    objective = LanguageObjective(Path(), "demonstrations", **options)  # type: ignore[arg-type]
    totals = objective.count(whole)
    lm.zero_grad()
    for cut in cuts:
        batch = objective.assemble(whole, cut, step=3)
        loss, _ = objective.loss(lm, embed_batch(lm, batch), batch, totals)
        loss.backward()
    gradient = lm.get_input_embeddings().weight.grad
    assert gradient is not None
    return gradient.clone()


def test_gradients_are_those_of_any_split_and_only_training_is_noisy(lm: PreTrainedModel) -> None:
    step = partial(take_steps, lm, noise=5.0, noise_seed=1)
    lm.train()
    whole = step([slice(0, 3)])
    torch.testing.assert_close(step([slice(0, 1), slice(1, 3)]), whole)
    assert torch.equal(step([slice(0, 3)]), whole), "the same at every call"
    plain = take_steps(lm, [slice(0, 3)])
    assert (whole - plain).abs().max() > 1e-3
    other = take_steps(lm, [slice(0, 3)], noise=5.0, noise_seed=2)
    assert (whole - other).abs().max() > 1e-3
    lm.eval()
    torch.testing.assert_close(step([slice(0, 3)]), take_steps(lm, [slice(0, 3)]))
    assert not lm.get_input_embeddings()._forward_hooks


def test_noise_moves_with_its_batch() -> None:
    noise = gather_noise(1.0, (1,), SEGMENTS[:1]).to(torch.device("meta"))
    assert isinstance(noise, EmbeddingNoise) and noise.lengths.is_meta
