"""Accelerated decoders against transformers' own, whole and packed, and what stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from raylign.data.packing import attention_mask, positions
from raylign.models.acceleration import accelerate, compile_layers
from raylign.models.attention import BLOCK, attend, find_starts, plan
from raylign.models.kernels import multiply

WIDTH, VOCABULARY = 48, 29


def build(kv_heads: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
    )
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return lm.to(dtype)


def draw_documents(rows: int, length: int) -> torch.Tensor:
    """Segments with documents of about 30 tokens, and padding at the end of the first row."""
    stream = torch.Generator().manual_seed(1)
    starts = torch.randint(0, 30, (rows, length), generator=stream) == 0
    segments = starts.cumsum(1) + 1
    segments[0, -length // 4 :] = 0
    return segments


def compare(
    plain: nn.Module, fast: nn.Module, segments: torch.Tensor | None, length: int
) -> tuple[float, float]:
    """Largest difference of hidden states and of gradients, relative to the largest of each."""
    stream = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCABULARY, (3, length), generator=stream)
    upstream = torch.randn(3, length, WIDTH, generator=stream)
    given = {}
    if segments is not None:
        given = {"attention_mask": attention_mask(segments), "position_ids": positions(segments)}
        upstream[segments == 0] = 0
    states = []
    for lm in (plain, fast):
        hidden = lm.get_decoder()(input_ids=tokens, use_cache=False, **given).last_hidden_state
        hidden.backward(upstream.to(hidden.dtype))
        states.append((hidden if segments is None else hidden[segments > 0]).detach())
    pairs = [
        (float((one.grad - two.grad).abs().max()), float(one.grad.abs().max()))
        for one, two in zip(plain.parameters(), fast.parameters(), strict=True)
        if one.grad is not None
    ]
    apart = (states[0] - states[1]).abs().max() / states[0].abs().max().clamp_min(1)
    return float(apart), max(far / large for far, large in pairs)


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("length", [17, BLOCK + 60])
@pytest.mark.parametrize("packed", [False, True])
def test_float32_is_that_of_transformers(kv_heads: int, length: int, packed: bool) -> None:
    plain = build(kv_heads)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    assert type(fast.model.layers[0].self_attn) is not type(plain.model.layers[0].self_attn)
    states, gradients = compare(plain, fast, draw_documents(3, length) if packed else None, length)
    assert states < 1e-5
    assert gradients < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(packed: bool) -> None:
    length = BLOCK + 60
    segments = draw_documents(3, length) if packed else None
    exact, plain = build(2), build(2, torch.bfloat16)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    errors = [compare(copy.deepcopy(exact), lm, segments, length) for lm in (plain, fast)]
    assert errors[1][0] < 1.5 * errors[0][0]
    assert errors[1][1] < 1.5 * errors[0][1]


def test_checkpointed_activations_give_the_same_gradients() -> None:
    plain = build(2)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    fast.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    states, gradients = compare(plain, fast, draw_documents(3, 50), 50)
    assert states < 1e-5
    assert gradients < 1e-5


def test_compiled_layers_give_the_same_gradients() -> None:
    plain = build(2)
    compiled = copy.deepcopy(plain)
    compile_layers(compiled, backend="aot_eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    states, gradients = compare(plain, compiled, draw_documents(3, 20), 20)
    assert states < 1e-5
    assert gradients < 1e-5


def test_names_generation_and_other_masks_stay() -> None:
    plain = build(2).eval()
    fast = copy.deepcopy(plain)
    accelerate(fast)
    assert list(fast.state_dict()) == list(plain.state_dict())
    prompt = torch.arange(5)[None]
    written = [
        lm.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for lm in (plain, fast)
    ]
    assert torch.equal(*written)
    padded = torch.tensor([[0, 0, 1, 1, 1]])  # left padding, which no document plan describes
    ours, theirs = (lm(input_ids=prompt, attention_mask=padded).logits for lm in (fast, plain))
    torch.testing.assert_close(ours[:, 2:], theirs[:, 2:], atol=1e-5, rtol=1e-5)


def test_adapters_keep_working_inside() -> None:
    peft = pytest.importorskip("peft")
    plain = build(2)
    fast = copy.deepcopy(plain)
    shape = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    torch.manual_seed(3)
    plain = peft.get_peft_model(plain, shape)
    torch.manual_seed(3)
    fast = peft.get_peft_model(fast, shape)
    accelerate(fast)
    trained = [name for name, p in fast.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2
    states, gradients = compare(
        plain.get_base_model(), fast.get_base_model(), draw_documents(3, 40), 40
    )
    assert states < 1e-5
    assert gradients < 1e-5


def test_a_mask_is_recognised_exactly() -> None:
    segments = draw_documents(2, 40)
    mask = attention_mask(segments)
    starts = find_starts(mask)
    assert starts is not None
    for row in range(2):
        for place in range(40):
            assert int(starts[row, place]) == int(mask[row, 0, place].nonzero()[0, 0])
    mask[1, 0, 30, 28] = not mask[1, 0, 30, 28]
    assert find_starts(mask) is None


@pytest.mark.parametrize("together", [1, 2**30])
@pytest.mark.parametrize("kept", [0, 2**30])
def test_any_cut_gives_the_same_attention(
    monkeypatch: pytest.MonkeyPatch, together: int, kept: int
) -> None:
    """Rows alone or together, probabilities kept or computed again."""
    monkeypatch.setattr("raylign.models.attention.SCORE_BYTES", together)
    monkeypatch.setattr("raylign.models.attention.KEPT_BYTES", kept)
    length = BLOCK + 40
    segments = draw_documents(3, length)
    mask = attention_mask(segments)
    torch.manual_seed(4)
    query = torch.randn(3, 4, length, 8, requires_grad=True)
    key, value = (torch.randn(3, 2, length, 8, requires_grad=True) for _ in range(2))
    pieces = plan(3, length, 4, torch.float32, find_starts(mask))
    ours = attend(query, key, value, 0.3, pieces)
    theirs = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(ours)
    inputs = [query, key, value]
    found, expected = (torch.autograd.grad(out, inputs, upstream) for out in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_products_take_gradients_that_are_not_stored_row_by_row() -> None:
    torch.manual_seed(5)
    states, weight = torch.randn(2, 5, 7), torch.randn(3, 7)
    for upstream in (torch.ones(1, 1, 1).expand(2, 5, 3), torch.randn(3, 5, 2).transpose(0, 2)):
        found, expected = (
            torch.autograd.grad(function(one, two), [one, two], upstream)
            for function in (multiply, nn.functional.linear)
            for one, two in [(states.clone().requires_grad_(), weight.clone().requires_grad_())]
        )
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_a_block_skips_the_documents_before_it() -> None:
    length = 4 * BLOCK
    starts = (torch.arange(length) // BLOCK * BLOCK).expand(1, -1)
    pieces = plan(1, length, 2, torch.float32, starts)
    assert [piece.keys.stop - piece.keys.start for piece in pieces] == [BLOCK] * 4
