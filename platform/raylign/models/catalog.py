"""What a recipe calls a model: a shape, a preset's name, a directory, or a name on the hub.

Nothing heavy is imported here: a plan is made before any model is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raylign.config import ModelConfig, UserError
from raylign.config.presets import PRESETS, suggest_preset
from raylign.models.hub import is_hub_name


def read_choice(model: ModelConfig | str, key: str) -> ModelConfig | str:
    """The shape to initialise, or the directory or hub name to continue from.

    A preset's name is a shape; put `./` before a directory that is called like one. Raises
    `UserError` for a string that can be none of these.
    """
    if isinstance(model, ModelConfig):
        return model
    if model in PRESETS:
        return ModelConfig(preset=model)
    if Path(model).exists() or is_hub_name(model):
        return model
    if "/" in model:
        raise UserError(f"{key}={model}: no such directory")
    raise UserError(
        f"{key}={model}: neither a preset, a directory, nor a hub name like org/name; "
        f"{suggest_preset(model)}"
    )


def write_fields(shape: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """`shape` in the words of `config.json`, with `vocab_size` entries unless it fixes them."""
    vocabulary = shape.vocab_size or vocab_size
    if shape.family == "gptj":
        return {
            "model_type": "gptj",
            "vocab_size": vocabulary,
            "n_embd": shape.hidden_size,
            "n_inner": shape.ffn_size,
            "n_layer": shape.layers,
            "n_head": shape.heads,
            "n_positions": shape.context,
            "rotary_dim": shape.rotary_dim or shape.hidden_size // shape.heads,
            "layer_norm_epsilon": shape.norm_eps,
            "tie_word_embeddings": shape.tie_embeddings,
            "architectures": ["GPTJForCausalLM"],
        }
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "rope_parameters": _write_rope(shape),
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tie_embeddings,
        "architectures": ["LlamaForCausalLM"],
    }


def _write_rope(shape: ModelConfig) -> dict[str, Any]:
    scaling = shape.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": shape.rope_theta}
    return {
        "rope_type": "llama3",
        "rope_theta": shape.rope_theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency,
        "high_freq_factor": scaling.high_frequency,
        "original_max_position_embeddings": scaling.original_context,
    }
