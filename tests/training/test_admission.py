"""What cannot be trained is refused from the configuration, before a rank is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from transformers import AutoConfig, PreTrainedConfig

from raylign.config import (
    AdapterConfig,
    EngineConfig,
    OptimizerConfig,
    ScheduleConfig,
    UserError,
    WorkersConfig,
)
from raylign.models.assembly import ModelPlan
from raylign.tracking import Bar
from raylign.training.admission import require_trainable, sketch
from raylign.training.loop import SupervisedTask
from raylign.training.objectives import LanguageObjective
from raylign.training.supervised import train

LLAMA = {
    "vocab_size": 57,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def make(kind: str, **more: Any) -> PreTrainedConfig:
    given = {"vocab_size": 57, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return AutoConfig.for_model(kind, **(given if kind == "gpt2" else LLAMA), **more)


REFUSED: dict[str, tuple[PreTrainedConfig, dict[str, Any], dict[str, int], int, str]] = {
    "ranks": (make("llama"), {}, {"tensor_parallel": 2}, 3, "3 ranks cannot be shared out"),
    "heads": (make("llama"), {}, {"tensor_parallel": 3}, 3, "must divide the model's heads=4"),
    "gpt2": (make("gpt2"), {}, {"tensor_parallel": 2}, 2, "how to cut|a gpt2"),
    "adapter": (make("llama"), {"peft": "lora"}, {"tensor_parallel": 2}, 2, "cannot be cut"),
    "norms": (make("qwen3"), {}, {"tensor_parallel": 2}, 2, "would see some heads only"),
    "window": (make("mistral"), {}, {"sequence_parallel": 2}, 2, "within a sliding window"),
    "prefix": (
        make("llama"),
        {"peft": "prefix"},
        {"sequence_parallel": 2},
        2,
        "peft=prefix works by a cache",
    ),
    "layers": (make("llama"), {}, {"pipeline_parallel": 3}, 3, "3 stages cannot share 2 layers"),
    "prompt": (make("llama"), {"peft": "prompt"}, {"pipeline_parallel": 2}, 2, "the whole model"),
    "targets": (
        make("llama"),
        {"peft": "lora", "adapter": AdapterConfig(targets=("c_attn",))},
        {},
        1,
        "no matrix of this model is called 'c_attn'",
    ),
    "loha": (make("gpt2"), {"peft": "loha"}, {}, 1, "peft has no loha for the matrices of a gpt2"),
    "logits": (make("llama", logits_soft_cap=3.0), {}, {}, 1, "change their logits"),
    "head": (make("granite"), {"head": "steps"}, {}, 1, "no AutoModelForTokenClassification"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_rank_would_refuse_is_refused_before(case: str) -> None:
    config, plan, engine, ranks, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        require_trainable(ModelPlan(config, 0, **plan), EngineConfig(**engine), ranks, "sft")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "case",
    [
        ("llama", {}, {"tensor_parallel": 2, "sequence_parallel": 2}, 4),
        ("llama", {"peft": "qlora"}, {"zero_stage": 3}, 2),
        ("llama", {"head": "score", "peft": "dora"}, {"pipeline_parallel": 2}, 4),
        ("gpt2", {"head": "steps", "peft": "qlora"}, {}, 1),
        ("gpt2", {"peft": "prefix"}, {}, 2),
        ("gemma2", {}, {}, 2),
    ],
)
def test_what_can_be_trained_is_let_through(
    case: tuple[str, dict[str, Any], dict[str, int], int],
) -> None:
    kind, plan, engine, ranks = case
    require_trainable(ModelPlan(make(kind), 0, **plan), EngineConfig(**engine), ranks, "sft")


def test_a_stage_is_refused_before_ray_is_asked(tiny_model: Path, tmp_path: Path) -> None:
    """There is no cluster here: whatever started a rank would fail otherwise."""
    task = SupervisedTask(
        name="pretrain",
        output=tmp_path,
        model=ModelPlan(tiny_model, 0),
        tokenizer=tiny_model,
        objective=LanguageObjective(tmp_path, "corpus"),
        seed=0,
        steps=1,
        batch_size=1,
        micro_batch_size=1,
        checkpoint_every=1,
        optimizer=OptimizerConfig(),
        schedule=ScheduleConfig(),
        engine=EngineConfig(tensor_parallel=2),
        threads=1,
        prompts=(),
        sample_tokens=1,
    )
    with pytest.raises(UserError, match=r"pretrain\.engine\.tensor_parallel=2 must divide"):
        train(task, WorkersConfig(count=2), cast(Bar, None))
    assert not list(tmp_path.iterdir())


def test_a_sketch_has_no_weights(tiny_model: Path) -> None:
    lm = sketch(ModelPlan(tiny_model, 0))
    assert {p.device.type for p in lm.parameters()} == {"meta"}
