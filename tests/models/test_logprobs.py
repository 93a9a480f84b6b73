"""Token scores against the naive computation on full logits, gradients included."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from raylign.config import ModelConfig
from raylign.models.enclosure import Enclosure
from raylign.models.loading import initialise
from raylign.models.logprobs import score_tokens
from raylign.models.presets import build_config

ROWS, LENGTH, VOCABULARY = 3, 9, 23


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    shape = ModelConfig(hidden_size=16, layers=2, ffn_size=24)
    return initialise(build_config(shape, VOCABULARY, pad_id=0, eos_id=1), 3)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    stream = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=stream)


def score_naively(
    model: PreTrainedModel, tokens: torch.Tensor, lengths: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.log_softmax(model(input_ids=tokens).logits / temperature, dim=-1)
    logprobs, entropy = torch.zeros(ROWS, LENGTH), torch.zeros(ROWS, LENGTH)
    for row in range(ROWS):
        for t in range(1, int(lengths[row])):
            logprobs[row, t] = table[row, t - 1, tokens[row, t]]
            entropy[row, t] = -(table[row, t - 1].exp() * table[row, t - 1]).sum()
    return logprobs, entropy


def take_gradient(
    model: PreTrainedModel, scores: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Of a loss in which every entry weighs differently."""
    weights = torch.linspace(-1, 2, ROWS * LENGTH).reshape(ROWS, LENGTH)
    loss = (scores[0] * weights).sum() + (scores[1] * weights.flip(1)).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("piece", [None, 1, 5, 8])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("lengths", [None, (9, 4, 2), (1, 9, 7)])
def test_scores_and_gradients_are_the_naive_ones(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    piece: int | None,
    temperature: float,
    lengths: tuple[int, ...] | None,
) -> None:
    given = None if lengths is None else torch.tensor(lengths)
    full = torch.full((ROWS,), LENGTH) if given is None else given
    ours = score_tokens(model, tokens, given, temperature, piece=piece)
    naive = score_naively(model, tokens, full, temperature)
    for mine, plain in zip(ours, naive, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == (ROWS, LENGTH)
        torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        take_gradient(model, ours), take_gradient(model, naive), atol=1e-5, rtol=1e-4
    )


def test_an_enclosed_model_scores_the_same(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    enclosed = Enclosure(model)
    assert enclosed.config is model.config
    assert torch.equal(enclosed(input_ids=tokens).logits, model(input_ids=tokens).logits)
    for mine, plain in zip(
        score_tokens(enclosed, tokens), score_tokens(model, tokens), strict=True
    ):
        assert torch.equal(mine, plain)


def test_a_uniform_distribution_has_known_scores(tokens: torch.Tensor) -> None:
    shape = ModelConfig(hidden_size=16, layers=1, ffn_size=16, tie_embeddings=False)
    blank = initialise(build_config(shape, VOCABULARY, pad_id=0, eos_id=1), 0)
    torch.nn.init.zeros_(blank.lm_head.weight)
    logprobs, entropy = score_tokens(blank, tokens)
    expected = torch.log(torch.tensor(float(VOCABULARY)))
    assert torch.allclose(logprobs[:, 1:], -expected) and torch.allclose(entropy[:, 1:], expected)
    assert torch.equal(logprobs[:, 0], torch.zeros(ROWS))


def test_nothing_to_score_is_no_error(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    logprobs, _ = score_tokens(model, tokens, torch.ones(ROWS, dtype=torch.int64))
    assert not logprobs.any()
    logprobs.sum().backward()


def test_greedy_choices_have_no_density(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        score_tokens(model, tokens, temperature=0.0)
