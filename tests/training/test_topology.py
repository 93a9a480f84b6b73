"""Ranks are shared out as the keys say, and impossible numbers are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from raylign.config import AlignConfig, EngineConfig, UserError
from raylign.models.sequence import share_sequences
from raylign.training.deepspeed_tensor import require_known
from raylign.training.topology import Topology, arrange, require_divisible


def test_ranks_that_talk_most_are_neighbours() -> None:
    grid = Topology(tensor=2, sequence=2, data=2)
    assert grid.world_size == 8
    assert grid.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert grid.groups("sequence") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert grid.groups("data") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert grid.groups("sequence", "data") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [grid.place(5, axis) for axis in ("tensor", "sequence", "data")] == [1, 0, 1]


def test_stages_of_a_pipeline_are_farthest_apart() -> None:
    grid = Topology(data=2, pipeline=2)
    assert grid.groups("pipeline") == [[0, 2], [1, 3]]
    assert grid.groups("tensor") == [[0], [1], [2], [3]]


def test_every_rank_is_in_one_group_along_every_axis() -> None:
    grid = Topology(tensor=3, sequence=2, data=2, pipeline=2)
    for axis in ("tensor", "sequence", "data", "pipeline"):
        groups = grid.groups(axis)
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(24))
        for ranks in groups:
            assert [grid.place(rank, axis) for rank in ranks] == list(range(len(ranks)))


def test_ranks_that_nothing_needs_are_data_parallel() -> None:
    found = arrange(EngineConfig(tensor_parallel=2, sequence_parallel=2), 12)
    assert found == Topology(tensor=2, sequence=2, data=3)


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"tensor_parallel": 2}, 3, "3 ranks cannot be shared out: sft.engine.tensor_parallel=2"),
    ({"tensor_parallel": 2, "sequence_parallel": 2}, 6, "is 4; make the number of ranks"),
    ({"backend": "torch", "tensor_parallel": 2}, 2, "tensor_parallel=2 needs backend=deepspeed"),
    ({"backend": "torch", "offload": "optimizer"}, 2, "offload=optimizer needs backend"),
    ({"zero_stage": 0, "offload": "optimizer"}, 2, "set zero_stage to 1, 2 or 3"),
    ({"zero_stage": 2, "offload": "all"}, 2, "not zero_stage=2; set it to 3, or offload to"),
    ({"zero_stage": 3, "tensor_parallel": 2}, 2, "cannot be combined with zero_stage=3"),
    ({"zero_stage": 2, "pipeline_parallel": 2}, 2, "set zero_stage to 0 or 1"),
    ({"tensor_parallel": 2, "pipeline_parallel": 2}, 4, "set them to 1"),
]


@pytest.mark.parametrize(("keys", "ranks", "expected"), REFUSED)
def test_what_cannot_be_is_refused_in_one_line(
    keys: dict[str, Any], ranks: int, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        arrange(EngineConfig(**keys), ranks, "sft.engine")
    message = str(caught.value)
    assert expected in message
    assert "sft.engine" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("keys", "sizes", "expected"),
    [
        ({"tensor_parallel": 3}, {}, "engine.tensor_parallel=3 must divide the model's heads=4"),
        ({"tensor_parallel": 4}, {}, "must divide the model's kv_heads=2"),
        ({"tensor_parallel": 2}, {"intermediate_size": 7}, "must divide the model's ffn_size=7"),
        ({"sequence_parallel": 3}, {}, "engine.sequence_parallel=3 must divide the model's 4 hea"),
        ({"tensor_parallel": 2, "sequence_parallel": 4}, {}, "the 2 heads of a tensor rank"),
    ],
)
def test_heads_and_widths_must_divide(
    keys: dict[str, int], sizes: dict[str, int], expected: str
) -> None:
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaConfig(**(shape | {"intermediate_size": 48} | sizes))
    with pytest.raises(UserError, match=expected):
        require_divisible(EngineConfig(**keys), model)


def test_key_value_heads_may_be_fewer_than_sequence_ranks() -> None:
    model = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=1)
    require_divisible(EngineConfig(sequence_parallel=4), model)


def test_learners_of_alignment_share_nothing_but_zero() -> None:
    assert AlignConfig.model_validate({"engine": {"zero_stage": 3}}).engine.zero_stage == 3
    with pytest.raises(ValueError, match="sequence_parallel: every learner trains on"):
        AlignConfig.model_validate({"engine": {"sequence_parallel": 2}})


def build(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


TINY = {"vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_models_whose_attention_cannot_be_exchanged_are_refused() -> None:
    nobody: Any = None  # refused before any rank is asked
    gptj = GPTJConfig(vocab_size=8, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    with pytest.raises(UserError, match="type gptj compute attention in a way of their own"):
        share_sequences(build(gptj), nobody, 4, 4)
    mistral = MistralConfig(**TINY, **HEADS, sliding_window=16)
    with pytest.raises(UserError, match="type mistral attend within a sliding window"):
        share_sequences(build(mistral), nobody, 4, 2)


def test_models_that_cannot_be_cut_are_refused() -> None:
    qwen = Qwen3Config(**TINY, **HEADS, head_dim=8)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_norm of a qwen3 would see some"):
        require_known(build(qwen))
    phi = Phi3Config(**TINY, **HEADS, pad_token_id=0)
    with pytest.raises(UserError, match=r"how to cut layers\.0\.self_attn\.qkv_proj of a phi3"):
        require_known(build(phi))
    require_known(build(LlamaConfig(**TINY, **HEADS)))
    require_known(build(GPTJConfig(vocab_size=8, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)))
