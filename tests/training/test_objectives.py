"""The summed cross-entropy against torch's own on full logits, and isolation of documents."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from raylign.config import ModelConfig
from raylign.data.packing import attention_mask, positions
from raylign.models.loading import initialise
from raylign.models.presets import build_config
from raylign.training.objectives import score_text

VOCABULARY = 19


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    shape = ModelConfig(hidden_size=16, layers=2, ffn_size=24)
    return initialise(build_config(shape, VOCABULARY, pad_id=0, eos_id=1), 3)


def draw(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def list_gradients(model: PreTrainedModel, loss: torch.Tensor) -> torch.Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("piece", [None, 1, 4])
def test_loss_and_gradients_are_the_naive_ones(model: PreTrainedModel, piece: int | None) -> None:
    tokens = draw(3, 8)
    trained = torch.rand(3, 8, generator=torch.Generator().manual_seed(2)) < 0.5
    trained[:, 0] = False
    ours = score_text(model, tokens, trained, piece=piece)
    logits = model(input_ids=tokens).logits
    naive = -sum(
        torch.log_softmax(logits[row, t - 1], -1)[tokens[row, t]]
        for row, t in trained.nonzero().tolist()
    )
    torch.testing.assert_close(ours, naive, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(
        list_gradients(model, ours), list_gradients(model, naive), atol=1e-5, rtol=1e-4
    )


def test_the_sum_over_parts_is_the_sum_over_the_whole(model: PreTrainedModel) -> None:
    tokens, trained = draw(4, 8), torch.ones(4, 8, dtype=torch.bool)
    trained[:, 0] = False
    whole = score_text(model, tokens, trained)
    parts = sum(
        score_text(model, tokens[cut], trained[cut])
        for cut in (slice(0, 1), slice(1, 4), slice(4, 4))
        if len(tokens[cut])
    )
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-6)


def test_no_trained_token_gives_a_zero_that_has_a_gradient(model: PreTrainedModel) -> None:
    loss = score_text(model, draw(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    assert float(loss.detach()) == 0.0
    assert not list_gradients(model, loss).any()


@pytest.mark.parametrize("lengths", [(5, 3, 4), (1, 10), (12,)])
def test_packed_documents_do_not_see_each_other(
    model: PreTrainedModel, lengths: tuple[int, ...]
) -> None:
    """Logits of a packed, padded row are those of its documents computed alone."""
    tokens = draw(1, 14)
    segments = torch.zeros(1, 14, dtype=torch.int64)
    start = 0
    for number, length in enumerate(lengths, 1):
        segments[0, start : start + length] = number
        start += length
    packed = model(
        input_ids=tokens, attention_mask=attention_mask(segments), position_ids=positions(segments)
    ).logits
    assert bool(packed.isfinite().all())
    start = 0
    for length in lengths:
        alone = model(input_ids=tokens[:, start : start + length]).logits
        torch.testing.assert_close(packed[:, start : start + length], alone, atol=1e-5, rtol=1e-5)
        start += length
