"""Parameters, operations and memory from `config.json` alone, against the models themselves."""

from __future__ import annotations

import json
from itertools import pairwise

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raylign.config import AdapterConfig, EngineConfig, ModelConfig, UserError
from raylign.data.packing import attention_mask, positions
from raylign.models.adapters import adapt
from raylign.models.budget import Blueprint, count, count_adapter, count_flops
from raylign.models.catalog import write_fields
from raylign.models.loading import initialise
from raylign.models.memory import LOGIT_BYTES, estimate, keep_block
from raylign.models.presets import build_config
from raylign.training.objectives import embed_batch
from raylign.training.pipeline_stage import Stage
from raylign.training.rows import MicroBatch

SMALL = {
    "vocab_size": 77,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def describe(**keys: object) -> Blueprint:
    return count(write_fields(ModelConfig.model_validate(keys), 50))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {**SMALL, "attention_bias": True, "mlp_bias": True, "head_dim": 8}),
        ("llama", {**SMALL, "tie_word_embeddings": True}),
        ("mistral", SMALL),
        ("qwen2", {**SMALL, "tie_word_embeddings": True}),
        ("qwen3", {**SMALL, "head_dim": 16}),
        ("gpt2", {"n_layer": 2, "n_embd": 48, "n_head": 4}),
        ("gptj", {"n_layer": 2, "n_embd": 48, "n_head": 4, "n_inner": 96, "rotary_dim": 4}),
    ],
)
def test_every_family_counts_like_its_model(kind: str, fields: dict[str, object]) -> None:
    config = AutoConfig.for_model(kind, **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = count(json.loads(config.to_json_string()))
    assert found.total == sum(p.numel() for p in model.parameters())
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    assert found.embedding == sum(p.weight.numel() for p in tables)
    assert found.context == config.max_position_embeddings


def test_what_cannot_be_counted_is_named() -> None:
    with pytest.raises(UserError, match=r"^x: the parameters of model_type='t5' cannot be counted"):
        count({"model_type": "t5"}, "x")
    with pytest.raises(UserError, match=r"^x: not a llama configuration .*hidden_size"):
        count({"model_type": "llama"}, "x")


def test_operations_of_a_model_by_hand() -> None:
    """Every number of a matrix is multiplied and added once a token forward and twice backward."""
    shape = describe(hidden_size=8, layers=3, heads=2, kv_heads=1, ffn_size=16, context=32)
    block = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    vectors = 2 * 8
    head = 50 * 8  # the same numbers as the embedding, which is looked up and costs nothing
    dense = 3 * (block + vectors) + 8 + head
    scores = 3 * 2 * 2 * 10 * 8  # layers, scores and sums, 2 FLOPs, 10 positions, all heads' width
    assert count_flops(shape, 10) == 3 * (2 * dense + scores)
    untied = describe(
        hidden_size=8, layers=3, heads=2, kv_heads=1, ffn_size=16, context=32, tie_embeddings=False
    )
    assert untied.total == shape.total + 400
    assert count_flops(untied, 10) == count_flops(shape, 10)


ADAPTERS = {
    "lora": lambda targets: peft.LoraConfig(r=6, target_modules=targets),
    "dora": lambda targets: peft.LoraConfig(r=6, target_modules=targets, use_dora=True),
    "vera": lambda targets: peft.VeraConfig(r=6, target_modules=targets),
    "loha": lambda targets: peft.LoHaConfig(r=6, target_modules=targets),
}
NAMES = {
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    ("q_proj", "v_proj"): ["q_proj", "v_proj"],
    ("layers.1.self_attn.k_proj", "mlp.up_proj"): ["layers.1.self_attn.k_proj", "mlp.up_proj"],
}


def count_peft(shape: ModelConfig, config: peft.PeftConfig) -> int:
    model = initialise(build_config(shape, 50, pad_id=0, eos_id=1), 0)
    config.task_type = "CAUSAL_LM"
    adapted = peft.get_peft_model(model, config)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", NAMES, ids=str)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_count_like_peft(kind: str, targets: str | tuple[str, ...]) -> None:
    shape = ModelConfig(hidden_size=24, ffn_size=40, layers=2, tie_embeddings=False)
    blueprint = count(write_fields(shape, 50))
    adapter = AdapterConfig(rank=6, targets=targets)
    theirs = count_peft(shape, ADAPTERS[kind](NAMES[targets]))
    assert count_adapter(blueprint, kind, adapter) == theirs
    if kind == "lora":
        for same in ("qlora", "loraplus"):
            assert count_adapter(blueprint, same, adapter) == theirs


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gpt2", {"n_layer": 2, "n_embd": 48, "n_head": 4, "vocab_size": 50}),
        ("gptj", {"n_layer": 2, "n_embd": 48, "n_head": 4, "vocab_size": 50, "rotary_dim": 4}),
        ("qwen2", SMALL),
    ],
)
@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp", ("c_proj", "k_proj")])
def test_a_plan_counts_what_training_will(
    kind: str, fields: dict[str, object], targets: str | tuple[str, ...]
) -> None:
    config = AutoConfig.for_model(kind, **fields)
    if isinstance(targets, tuple):
        targets = targets[:1] if kind == "gpt2" else targets[1:]
    for method in ("lora",) if kind == "gpt2" else ("dora", "vera"):
        chosen = AdapterConfig(targets=targets)
        adapted = adapt(AutoModelForCausalLM.from_config(config), method, chosen, 0, "base")
        learnt = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert count_adapter(count(config.to_dict()), method, chosen) == learnt


@pytest.mark.parametrize("preset", ["tiny", "tiny-gptj"])
def test_what_stands_before_the_text_counts_like_peft(preset: str) -> None:
    shape = ModelConfig(preset=preset)
    blueprint = count(write_fields(shape, 50))
    prompt = peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    adapter = AdapterConfig(virtual_tokens=5)
    assert count_adapter(blueprint, "prompt", adapter) == count_peft(shape, prompt)
    assert count_adapter(blueprint, "prefix", adapter) == count_peft(shape, prefix)


def test_a_target_that_is_not_there_is_named() -> None:
    adapter = AdapterConfig(targets=("q_proj", "wq"))
    with pytest.raises(UserError, match=r"^sft.adapter.targets: a llama has no 'wq'; it has s"):
        count_adapter(describe(), "lora", adapter, "sft.adapter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("keys", "isolate"),
    [
        ({"kv_heads": 2}, False),
        ({"kv_heads": 2}, True),
        ({"kv_heads": 4, "ffn_size": 96}, True),
        ({"preset": "tiny-gptj"}, False),
    ],
    ids=str,
)
def test_activations_are_those_that_autograd_keeps(
    keys: dict[str, object], isolate: bool, dtype: torch.dtype
) -> None:
    """Bytes saved by models of one and of two blocks differ by a block's."""
    rows, length = 3, 96
    kept = []
    for layers in (1, 2):
        shape = ModelConfig.model_validate({"hidden_size": 64, "ffn_size": 160} | keys)
        shape = shape.model_copy(update={"layers": layers})
        kept.append(_measure_saved(shape, rows, length, isolate, dtype))
    block = keep_block(count(write_fields(shape, 50)), dtype.itemsize, length, isolate)
    assert (kept[1] - kept[0]) / (rows * length) == pytest.approx(block, rel=0.02)


def _measure_saved(
    shape: ModelConfig, rows: int, length: int, isolate: bool, dtype: torch.dtype
) -> int:
    model = initialise(build_config(shape, 50, pad_id=0, eos_id=1), 0).to(dtype).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    tokens = torch.randint(0, 50, (rows, length))
    mask = places = None
    if isolate:
        segments = torch.ones_like(tokens)
        mask, places = attention_mask(segments), positions(segments)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embed_batch(model, MicroBatch(tokens, tokens > 0, mask, places))
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


def test_memory_by_hand() -> None:
    shape = describe(hidden_size=8, layers=2, heads=2, kv_heads=1, ffn_size=16)
    n = shape.total

    def plan(ranks: int = 4, trainable: int = n, quantization: str | None = None, **keys: object):
        engine = EngineConfig.model_validate(keys)
        return estimate(shape, trainable, engine, ranks, 2, 16, False, quantization)

    full = plan(backend="torch")
    assert (full.weights, full.gradients, full.optimizer) == (4 * n, 4 * n, 8 * n)
    assert full.logits == 3 * 4 * 2 * 16 * 50
    # ZeRO's own example: 2 bytes of weights, 4 of gradients (float32 here), 12 of state.
    for stage, divided in enumerate([(1, 1, 1), (1, 1, 4), (1, 4, 4), (4, 4, 4)]):
        found = plan(zero_stage=stage, dtype="bfloat16")
        wanted = [amount * n / by for amount, by in zip((2, 4, 12), divided, strict=True)]
        assert [found.weights, found.gradients, found.optimizer] == wanted
    moved = plan(zero_stage=3, offload="all")
    assert (moved.weights, moved.optimizer, moved.host) == (0, 0, (4 + 12) * n / 4)
    # 100 numbers learn; of the others the matrices have about half a byte.
    matrices = 2 * sum(m.parameters for m in shape.matrices)
    frozen = plan(trainable=100, quantization="nf4", dtype="bfloat16", zero_stage=0)
    assert frozen.weights == pytest.approx(2 * (n - matrices + 100) + 0.516 * matrices)
    assert (frozen.gradients, frozen.optimizer) == (400, 1200)
    again = plan(activation_checkpointing=True)
    assert again.activations == 2 * 16 * (2 * 8 * 4 + keep_block(shape, 4, 16, False))


def test_ranks_that_cut_matrices_keep_the_rest_whole() -> None:
    shape = describe(hidden_size=8, layers=2, heads=2, kv_heads=1, ffn_size=16)
    matrices = 2 * sum(m.parameters for m in shape.matrices)
    cut = EngineConfig(zero_stage=0, dtype="bfloat16", tensor_parallel=2)
    found = estimate(shape, shape.total, cut, 4, 2, 16, False)
    held = shape.total - matrices / 2
    assert (found.weights, found.gradients, found.optimizer) == (2 * held, 4 * held, 12 * held)
    # Norms keep their inputs in float32, what they make, and a number a token.
    norms = 2 * ((4 + 2 * 2) * 8 + 4)
    block = keep_block(shape, 2, 16, False)
    assert found.activations == 2 * 16 * 2 * (norms + (block - norms) / 2)
    assert keep_block(shape, 2, 16, True, 2) - keep_block(shape, 2, 16, False, 2) == (
        2 * 16 + 2 * 2 * (8 - 4) / 2  # the mask, and keys and values as many as queries
    )
    # Llama 3.1 8B by 8: two tables of 128,256 x 4,096, and an eighth of 6.98 G in the blocks.
    large = count(write_fields(ModelConfig(preset="llama-3.1-8b"), 128_256))
    eighth = estimate(large, large.total, EngineConfig(tensor_parallel=8), 1, 1, 64, False)
    assert eighth.weights / 4 == pytest.approx(1.92e9, rel=0.005)


@pytest.mark.parametrize(
    ("keys", "stages"),
    [
        ({"layers": 5, "tie_embeddings": True}, 2),
        ({"layers": 5, "tie_embeddings": False}, 3),
        ({"preset": "tiny-gptj", "layers": 4}, 4),
    ],
)
def test_the_largest_stage_is_what_a_pipeline_needs(keys: dict[str, object], stages: int) -> None:
    """Its weights, and activations of as many micro-batches as are on their way."""
    shape = ModelConfig.model_validate(keys)
    models = [initialise(build_config(shape, 50, pad_id=0, eos_id=1), 0) for _ in range(stages)]
    parts = [Stage(lm, index, stages) for index, lm in enumerate(models)]
    held = [sum(p.numel() for p in part.parameters()) for part in parts]
    layers = [high - low for low, high in pairwise(parts[0].bounds)]
    blueprint = count(write_fields(shape, 50))
    engine = EngineConfig(backend="torch", pipeline_parallel=stages)
    for micro_batches in (1, 3):
        found = estimate(
            blueprint, blueprint.total, engine, 1, 2, 16, False, micro_batches=micro_batches
        )
        kept = keep_block(blueprint, 4, 16, False)
        alive = [min(stages - stage, micro_batches) for stage in range(stages)]
        logits = [0] * (stages - 1) + [3 * 4 * 2 * 16 * 50]
        wanted = [
            16 * held[stage] + 2 * 16 * kept * layers[stage] * alive[stage] + logits[stage]
            for stage in range(stages)
        ]
        assert found.device == max(wanted)


def test_the_host_builds_the_model_before_it_is_shared_out() -> None:
    shape = describe(hidden_size=8, layers=2, heads=2, kv_heads=1, ffn_size=16)
    for dtype, each in (("float32", 4), ("bfloat16", 6)):
        engine = EngineConfig.model_validate({"zero_stage": 3, "dtype": dtype})
        assert estimate(shape, shape.total, engine, 8, 1, 16, False).built == each * shape.total


def test_logits_are_made_in_pieces_of_this_size() -> None:
    large = count(write_fields(ModelConfig(preset="llama-3.1-8b"), 128_256))
    found = estimate(large, large.total, EngineConfig(), 1, 4, 4096, False)
    assert found.logits == 3 * LOGIT_BYTES
