"""Shapes become plain Llama configurations."""

from __future__ import annotations

import pytest

from raylign.config import ModelConfig
from raylign.models.loading import initialise
from raylign.models.presets import build_config, count_parameters


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_without_building_the_model(tied: bool) -> None:
    shape = ModelConfig(
        hidden_size=48, layers=3, heads=6, kv_heads=2, ffn_size=100, tie_embeddings=tied
    )
    config = build_config(shape, 77, pad_id=0, eos_id=1)
    built = sum(p.numel() for p in initialise(config, 0).parameters())
    assert count_parameters(config) == built


def test_the_shape_is_the_one_asked_for() -> None:
    shape = ModelConfig(
        hidden_size=64, layers=2, heads=4, kv_heads=1, ffn_size=96, rope_theta=500.0, context=33
    )
    model = initialise(build_config(shape, 50, pad_id=2, eos_id=3), 0)
    block = model.model.layers[1]
    assert type(model).__name__ == "LlamaForCausalLM" and len(model.model.layers) == 2
    assert block.self_attn.q_proj.weight.shape == (64, 64)
    assert block.self_attn.k_proj.weight.shape == (16, 64)  # one head of 16 serves four
    assert block.mlp.gate_proj.weight.shape == (96, 64)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # RoPE: the i-th frequency of a head of width 16 is theta^(-2i/16).
    assert model.model.rotary_emb.inv_freq[1] == pytest.approx(500.0 ** (-2 / 16))
    assert model.config.max_position_embeddings == 33
    assert (model.config.pad_token_id, model.config.eos_token_id) == (2, 3)
