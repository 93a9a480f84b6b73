"""Shapes and presets become plain Hugging Face configurations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig

from raylign.config import ModelConfig, UserError
from raylign.config.presets import PRESETS
from raylign.data.packing import attention_mask, positions
from raylign.models.budget import count
from raylign.models.catalog import read_choice
from raylign.models.hub import locate_config
from raylign.models.loading import initialise, load_model, load_tokenizer, save_model
from raylign.models.presets import build_config, count_parameters
from raylign.training.objectives import embed_batch
from raylign.training.rows import MicroBatch


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_counted_without_building_the_model(name: str) -> None:
    shape = ModelConfig(preset=name)
    config = build_config(shape, 5003, pad_id=0, eos_id=1)
    assert type(config) is (GPTJConfig if shape.family == "gptj" else LlamaConfig)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert count_parameters(config) == sum(p.numel() for p in built.parameters())
    assert built.config.architectures == [type(built).__name__]


def test_presets_have_the_sizes_they_are_known_by() -> None:
    def size(name: str, vocabulary: int) -> int:
        config = build_config(ModelConfig(preset=name), vocabulary, pad_id=0, eos_id=1)
        return count_parameters(config)

    assert size("gpt2-125m", 50_304) == pytest.approx(125e6, rel=0.01)
    assert size("shakespeare-char", 65) == pytest.approx(10.65e6, rel=0.01)  # nanoGPT's
    assert size("llama-3.1-8b", 128_256) == 8_030_261_248  # Meta's
    assert size("gptj-6b", 50_257) == 6_050_882_784  # EleutherAI's


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


def test_keys_beside_a_preset_change_it() -> None:
    shape = ModelConfig.model_validate(
        {"preset": "llama-3.1-8b", "layers": 1, "hidden_size": 256, "ffn_size": 64, "vocab_size": 9}
    )
    assert (shape.layers, shape.heads, shape.kv_heads, shape.context) == (1, 32, 8, 131_072)
    model = initialise(build_config(shape, 9, pad_id=0, eos_id=1), 0)
    # Of head width 8 and theta 5e5 the frequencies are 1, 5e5^-1/4, ...; a wave of which 8192
    # tokens hold more than 4 turns stays, and one of which they hold less than 1 is 8 times longer.
    found = model.model.rotary_emb.inv_freq
    plain = [500_000.0 ** (-2 * i / 8) for i in range(4)]
    assert 8192 * plain[2] / (2 * math.pi) < 4 < 8192 * plain[1] / (2 * math.pi)
    assert found[:2].tolist() == pytest.approx(plain[:2])
    assert found[3] == pytest.approx(plain[3] / 8)


def test_gptj_rotates_part_of_a_head_and_computes() -> None:
    shape = ModelConfig(preset="tiny-gptj")
    model = initialise(build_config(shape, 50, pad_id=0, eos_id=1), 0)
    assert model.config.rotary_dim == 8
    tokens = torch.tensor([[5, 6, 7, 8]])
    later = torch.tensor([[5, 6, 7, 9]])
    first, second = (model(input_ids=t).logits for t in (tokens, later))
    assert first.shape == (1, 4, 50)
    assert torch.equal(first[:, :3], second[:, :3]) and not torch.equal(first, second)


@pytest.mark.parametrize("name", ["tiny", "tiny-gptj"])
def test_a_preset_goes_to_disk_and_back(name: str, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    config = build_config(ModelConfig(preset=name), len(tokenizer), pad_id=0, eos_id=1)
    model = initialise(config, 0)
    save_model(model, model.config, tokenizer, tmp_path)
    loaded = load_model(tmp_path)
    tokens = torch.arange(2, 20)[None]
    assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert locate_config(tmp_path) == tmp_path / "config.json"
    fields = json.loads((tmp_path / "config.json").read_text())
    assert count(fields).total == sum(p.numel() for p in loaded.parameters())


def test_documents_of_a_row_do_not_see_each_other_in_any_family() -> None:
    tokens = torch.arange(5, 17)[None]
    segments = torch.tensor([[1] * 5 + [2] * 7])
    packed = MicroBatch(tokens, tokens > 0, attention_mask(segments), positions(segments))
    alone = MicroBatch(tokens[:, 5:], tokens[:, 5:] > 0, None, None)
    for name in ("tiny", "tiny-gptj"):
        model = initialise(build_config(ModelConfig(preset=name), 50, pad_id=0, eos_id=1), 0)
        second = embed_batch(model, packed)[:, 5:]
        torch.testing.assert_close(second, embed_batch(model, alone), atol=2e-6, rtol=1e-5)


def test_the_vocabulary_is_the_tokenizers_unless_the_shape_fixes_it() -> None:
    def build(**keys: object) -> int:
        shape = ModelConfig.model_validate(keys)
        return build_config(shape, 1000, pad_id=0, eos_id=1).vocab_size

    assert build(preset="gpt2-125m") == 1000
    assert build(preset="gpt2-125m", vocab_size=1024) == 1024  # rows nobody uses
    assert build(preset="gptj-6b") == 50_400
    with pytest.raises(UserError, match=r"tokenizer has 1,000 entries and preset tiny has vocab_s"):
        build(preset="tiny", vocab_size=999)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"preset": "gpt2-124m"}, "no preset of this name; did you mean gpt2-125m"),
        ({"preset": "xyz"}, "no preset of this name; there are tiny, "),
        ({"heads": 3}, "heads=3 must divide hidden_size=128"),
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"hidden_size": 12}, "heads are 3 wide; RoPE rotates pairs"),
        ({"preset": "gpt2-125m", "heads": 7}, "heads=7 must divide hidden_size=768"),
        ({"preset": "tiny", "rotary_dim": 8}, "rotary_dim has no effect with family=llama"),
        ({"preset": "tiny-gptj", "kv_heads": 2}, "kv_heads has no effect with family=gptj"),
        ({"preset": "tiny-gptj", "rotary_dim": 18}, "rotary_dim=18 must be even and at most"),
        ({"preset": "tiny-gptj", "tie_embeddings": True}, "the head of a gptj has a bias"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate(keys)


def test_a_string_is_a_preset_a_directory_or_a_hub_name(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "mine").mkdir()
    shape = ModelConfig(layers=3)
    assert read_choice(shape, "k") is shape
    assert read_choice("tiny", "k") == ModelConfig(preset="tiny")
    for name in ("./tiny", "mine", "org/name", "org/name@v1.0", "Qwen/Qwen2.5-0.5B"):
        assert read_choice(name, "k") == name
    with pytest.raises(UserError, match=r"^k=gpt2-124m: neither a preset, .*mean gpt2-125m"):
        read_choice("gpt2-124m", "k")
    with pytest.raises(UserError, match=r"^k=runs/a/pretrain: no such directory"):
        read_choice("runs/a/pretrain", "k")
