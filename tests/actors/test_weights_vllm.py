"""Weights packed straight into vLLM's layers serve the same bits as its own reload."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from actors.transports import SharedMemory
from actors.weights import AdapterSpec, Canary, adopt_weights, publish_weights, receive_weights
from raylign.inference.generator import AdapterForm, Sampling, build_generator, generate
from raylign.inference.vllm_weights import place_adapter, plan_weights
from raylign.models.logprobs import score_tokens
from raylign.training.buckets import SyncError

pytestmark = pytest.mark.slow
SEQUENCES = [tuple(range(2, 40)), (5, 6, 7, 8, 50)]
SHAPE = {
    "vocab_size": 57,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
ENGINE: dict[str, Any] = {
    "max_length": 64,
    "kv_cache_mb": 32,
    "max_sequences": 8,
    "threads": 1,
    "seed": 0,
}
CASES = {
    "llama, tied, float32": (LlamaConfig, True, "float32"),
    "llama, untied, bfloat16": (LlamaConfig, False, "bfloat16"),
    "qwen2, tied, bfloat16": (Qwen2Config, True, "bfloat16"),
}


def build(config: Any, tied: bool, tokenizer: Path, directory: Path) -> PreTrainedModel:
    shutil.copytree(tokenizer, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config(**SHAPE, tie_word_embeddings=tied))
    model.save_pretrained(directory)
    return model


def score(generator: Any) -> list[np.ndarray]:
    generator._engine.reset_prefix_cache(reset_running_requests=True)
    scores: list[np.ndarray] = generator.score(SEQUENCES)
    return scores


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def reload(generator: Any, weights: dict[str, torch.Tensor]) -> None:
    from raylign.inference import vllm_generator

    generator._engine.collective_rpc(
        "reload_weights", kwargs={"weights_iterator": iter(weights.items())}
    )
    vllm_generator._repack_tied_heads(generator._model())


@pytest.mark.parametrize("case", CASES)
def test_planned_weights_serve_the_bits_of_a_reload(
    case: str, tiny_model: Path, tmp_path: Path
) -> None:
    config, tied, dtype = CASES[case]
    model = build(config, tied, tiny_model, tmp_path / "model")
    generator: Any = build_generator("vllm", tmp_path / "model", dtype=dtype, **ENGINE)
    served = getattr(torch, dtype)
    first = {name: p.detach().to(served) for name, p in model.named_parameters()}
    second = {name: (p.float() * 1.1 + 0.01).to(served) for name, p in first.items()}
    reload(generator, second)
    expected = score(generator)
    reload(generator, first)
    before = score(generator)
    assert not equal(before, expected)

    plan = plan_weights(generator._model())
    assert plan is not None and set(plan.names) == set(first)
    local = SharedMemory()
    for limit in (1 << 20, 64):  # joined where they lie, and joined by copying
        manifest = publish_weights(1, second, Canary((), ()), local, limit=limit)
        plan.load(receive_weights(manifest))
        assert equal(score(generator), expected)
        plan.load(first.items())
        assert equal(score(generator), before)
    plan.load((name, tensor.float()) for name, tensor in second.items())  # the learner's type
    assert equal(score(generator), expected)
    reload(generator, first)  # vLLM's own way stays open
    assert equal(score(generator), before)
    plan.load(second.items())
    assert equal(score(generator), expected)
    check_refusals(plan, first)
    generator.close()


def check_refusals(plan: Any, weights: dict[str, torch.Tensor]) -> None:
    *_, last = weights
    with pytest.raises(SyncError, match=f"1 weights did not come, the first {last}"):
        plan.load((n, t) for n, t in weights.items() if n != last)
    with pytest.raises(SyncError, match="other is no weight of the served model"):
        plan.load([("other", torch.zeros(1))])
    with pytest.raises(SyncError, match=r"norm.weight is \(63,\), and was \(64,\)"):
        plan.load([("model.norm.weight", torch.zeros(63))])
    twice = ("model.norm.weight", weights["model.norm.weight"])
    with pytest.raises(SyncError, match="or came twice"):
        plan.load([twice, twice])


def test_models_that_need_more_than_packing_are_left_to_vllm() -> None:
    class GPT2LMHeadModel(torch.nn.Module):
        pass

    class LlamaForCausalLM(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Linear(2, 2)  # of no kind that is known

    assert plan_weights(GPT2LMHeadModel()) is None
    assert plan_weights(LlamaForCausalLM()) is None


def test_an_adapter_is_placed_from_memory_and_serves_as_if_folded_in(tiny_model: Path) -> None:
    targets = ("q_proj", "v_proj", "up_proj", "down_proj")
    form = AdapterForm(4, targets)
    generator: Any = build_generator("vllm", tiny_model, dtype="float32", adapter=form, **ENGINE)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    chosen = LoraConfig(r=4, lora_alpha=12, target_modules=list(targets))
    tuned = get_peft_model(base, chosen).eval()
    spec, local = AdapterSpec(4, 12, targets), SharedMemory()
    for version in (1, 2):
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1 * version)
        tensors = get_peft_model_state_dict(tuned)
        expected = [
            score_tokens(tuned, torch.tensor([sequence]))[0][0].detach().numpy()
            for sequence in SEQUENCES
        ]
        canary = Canary(tuple(SEQUENCES), tuple(expected))
        sent = publish_weights(version, tensors.items(), canary, local, adapter=spec)
        assert adopt_weights(generator, sent, 1e-4, "worker") < 1e-4
        assert generator.version == version
        with tuned.disable_adapter():
            plain = score_tokens(tuned, torch.tensor([SEQUENCES[0]]))[0][0].detach().numpy()
        assert np.abs(expected[0] - plain).max() > 1e-2
        [[sample]] = generate(generator, [SEQUENCES[1]], Sampling(temperature=0, max_tokens=6))
        whole = torch.tensor([[*SEQUENCES[1], *sample.token_ids]])
        drawn = score_tokens(tuned, whole)[0][0, len(SEQUENCES[1]) :].detach()
        assert drawn.isfinite().all() and set(sample.versions) == {version}
        logits = tuned(whole).logits[0, len(SEQUENCES[1]) - 1 : -1]
        assert logits.argmax(-1).tolist() == list(sample.token_ids)

    manager = generator._engine.engine_core.engine_core.model_executor.driver_worker.worker
    manager = manager.model_runner.lora_manager
    from vllm.lora.peft_helper import PEFTHelper

    form = PEFTHelper(r=4, lora_alpha=12, target_modules=list(targets))
    first, *rest = tensors.items()
    with pytest.raises(SyncError, match="did not come"):
        place_adapter(manager, form, 1, rest)
    with pytest.raises(SyncError, match="is no part of an adapter of k_proj"):
        place_adapter(manager, replace(form, target_modules=["k_proj"]), 1, [first])
    with pytest.raises(SyncError, match=r"which is not of rank 2"):
        place_adapter(manager, replace(form, r=2), 1, [first])
    with pytest.raises(SyncError, match="rank is 16, and the engine holds up to 8"):
        place_adapter(manager, replace(form, r=16), 1, [first])
    generator.close()
