"""The head in pieces against torch's cross-entropy on full logits: values, gradients, memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from raylign.models.crossentropy import score_targets, sum_costs

PLATFORM = Path(__file__).resolve().parents[2] / "platform"
WIDTH, VOCABULARY, POSITIONS = 16, 37, 11

MEMORY = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from raylign.models.crossentropy import score_targets, sum_costs
torch.set_num_threads(1)
lm = LlamaForCausalLM(LlamaConfig(vocab_size=32768, hidden_size=32, intermediate_size=32,
                                  num_hidden_layers=1, num_attention_heads=1))
def learn(kind, positions):
    states = torch.randn(positions, 32, requires_grad=True)
    targets = torch.randint(32768, (positions,))
    if kind == "sum":
        loss = sum_costs(lm, states, targets)
    elif kind == "scores":
        scores, entropies = score_targets(lm, states, targets)
        loss = (scores * torch.rand(positions)).sum() + entropies.sum()
    else:
        logits = lm.lm_head(states).float()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    loss.backward()
def peak():
    # Not getrusage's: that of a process starts at what its parent held when it forked.
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
learn("sum", 8)
before = peak()
for kind in ("sum", "scores", "naive"):  # the peak only grows
    learn(kind, 2048)
    print(peak() - before)
"""


def build(tied: bool, bias: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=tied,
    )
    lm = LlamaForCausalLM(config)
    if bias:
        lm.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY))
    with torch.no_grad():
        lm.lm_head.weight.normal_()
    return lm.to(dtype)


def draw(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(1)
    states = torch.randn(POSITIONS, WIDTH, generator=stream).to(dtype).requires_grad_()
    return states, torch.randint(0, VOCABULARY, (POSITIONS,), generator=stream)


def differentiate(
    lm: LlamaForCausalLM, states: torch.Tensor, loss: torch.Tensor
) -> list[torch.Tensor]:
    inputs = [states, *lm.lm_head.parameters()]
    return [g.float() for g in torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("piece", [None, 1, 4, 11])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_that_of_torch(dtype: torch.dtype, bias: bool, piece: int | None) -> None:
    lm, (states, targets) = build(False, bias, dtype), draw(dtype)
    logits = lm.lm_head(states).float()
    naive = nn.functional.cross_entropy(logits, targets, reduction="sum")
    ours = sum_costs(lm, states, targets, piece=piece)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, naive, rtol=1e-6, atol=0)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    found, expected = (differentiate(lm, states, loss * 0.3) for loss in (ours, naive))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max())


@pytest.mark.parametrize("piece", [None, 1, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropies", [False, True])
def test_scores_have_the_naive_gradients(
    piece: int | None, temperature: float, entropies: bool
) -> None:
    lm, (states, targets) = build(False, bias=True), draw(torch.float32)
    weights = torch.linspace(-1, 2, POSITIONS)
    table = torch.log_softmax(lm.lm_head(states) / temperature, -1)
    naive = (table.gather(1, targets[:, None])[:, 0] * weights).sum()
    scores, entropy = score_targets(
        lm, states, targets, temperature, entropies=entropies, piece=piece
    )
    ours = (scores * weights).sum()
    if entropies:
        naive = naive - ((table.exp() * table).sum(-1) * weights.flip(0)).sum()
        ours = ours + (entropy * weights.flip(0)).sum()
    torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        differentiate(lm, states, ours), differentiate(lm, states, naive), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=5e-6 * other.abs().max())


def test_a_tied_weight_gets_both_gradients() -> None:
    lm = build(tied=True)
    tokens = torch.arange(POSITIONS)
    hidden = lm.model(input_ids=tokens[None]).last_hidden_state[0, :-1]
    ours = sum_costs(lm, hidden, tokens[1:], piece=3)
    logits = lm(input_ids=tokens[None]).logits[0, :-1]
    naive = nn.functional.cross_entropy(logits, tokens[1:], reduction="sum")
    weight = lm.get_input_embeddings().weight
    (found,), (expected,) = (torch.autograd.grad(loss, [weight]) for loss in (ours, naive))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_passes_the_gradient_on() -> None:
    lm, (states, targets) = build(False), draw(torch.float32)
    lm.lm_head.requires_grad_(False)
    for loss in (sum_costs(lm, states, targets), score_targets(lm, states, targets)[0].sum()):
        (gradient,) = torch.autograd.grad(loss, [states])
        assert gradient.abs().sum() > 0


def test_another_kind_of_head_is_called_as_a_module() -> None:
    lm, (states, targets) = build(False), draw(torch.float32)
    expected = sum_costs(lm, states, targets)
    lm.lm_head = nn.Sequential(lm.lm_head)
    torch.testing.assert_close(sum_costs(lm, states, targets, piece=4), expected)


def test_nothing_to_learn_from_costs_nothing() -> None:
    lm, (states, targets) = build(False), draw(torch.float32)
    loss = sum_costs(lm, states[:0], targets[:0])
    assert float(loss.detach()) == 0
    assert not any(g.any() for g in differentiate(lm, states, loss))
    with torch.no_grad():
        assert not sum_costs(lm, states, targets).requires_grad


@pytest.mark.slow
def test_the_logits_are_never_held_at_once() -> None:
    """2,048 positions of 32,768 words are 256 MiB of float32; a piece of them is 64 MiB."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY],
        env={"PYTHONPATH": str(PLATFORM), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    for_sum, for_scores, naive = (int(line) for line in result.stdout.split()[-3:])
    assert for_sum < 150
    assert for_scores < 330
    assert naive > 600
