"""Models go out to plain Hugging Face directories and come back, or one line says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from raylign.config import ModelConfig, UserError
from raylign.models.loading import (
    initialise,
    load_config,
    load_model,
    load_tokenizer,
    pad_id,
    require_chat_template,
    save_model,
)
from raylign.models.presets import build_config


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A model directory to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def test_a_seed_gives_the_same_weights_to_the_bit() -> None:
    config = build_config(
        ModelConfig(hidden_size=16, layers=1, ffn_size=16), 20, pad_id=0, eos_id=1
    )
    torch.manual_seed(5)
    first = initialise(config, 2**62 + 1).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(6)
    second, other = initialise(config, 2**62 + 1).state_dict(), initialise(config, 4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1)), "the global stream is left alone"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_loaded(tiny_model: Path, tmp_path: Path, tied: bool, dtype: str) -> None:
    tokenizer = load_tokenizer(tiny_model)
    shape = ModelConfig(hidden_size=16, layers=1, ffn_size=16, tie_embeddings=tied)
    model = initialise(build_config(shape, len(tokenizer), pad_id=0, eos_id=1), 0)
    model = model.to(getattr(torch, dtype))
    save_model(model, model.config, tokenizer, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118
    ours = load_model(tmp_path, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.use_cache and theirs.config.architectures == ["LlamaForCausalLM"]
    assert theirs.dtype == getattr(torch, dtype) and theirs.generation_config.eos_token_id == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
        assert torch.equal(theirs.state_dict()[name], tensor)
    spelt = AutoTokenizer.from_pretrained(tmp_path)
    assert spelt.encode("w1 w2") == tokenizer.encode("w1 w2")
    assert spelt.chat_template == tokenizer.chat_template


def test_missing_things_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a directory; give a directory that holds"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no tokenizer: tokenizer_config.json is missing"):
        (tmp_path / "empty").mkdir()
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(UserError, match=r"holds no model: config.json is missing"):
        load_config(tmp_path / "empty")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \*.safetensors weights"):
        load_model(copy)


def test_damaged_things_are_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"lacks 9 of its weights, such as model.layers.2"):
        load_model(copy)
    (copy / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(UserError, match=r"model .*copy cannot be loaded: "):
        load_model(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not valid JSON"):
        load_model(copy)
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"model .*copy cannot be loaded: "):
        load_model(copy)


def test_every_error_is_one_line(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError) as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


def test_a_missing_chat_template_is_named(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    require_chat_template(tokenizer, tiny_model)
    tokenizer.chat_template = "{{ messages }}"
    require_chat_template(tokenizer, tiny_model)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template; add chat_template.jinja"):
        require_chat_template(tokenizer, tiny_model)


def test_padding_falls_back_on_the_end_of_sequence(copy: Path) -> None:
    assert pad_id(load_tokenizer(copy)) == 0
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert pad_id(load_tokenizer(copy)) == 1
    config.pop("eos_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has no eos_token"):
        load_tokenizer(copy)
