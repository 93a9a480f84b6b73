"""From a shape in a recipe to a plain transformers configuration."""

from __future__ import annotations

from transformers import LlamaConfig

from raylign.config import ModelConfig


def build_config(shape: ModelConfig, vocab_size: int, *, pad_id: int, eos_id: int) -> LlamaConfig:
    """A Llama of this shape: RoPE, RMSNorm, SwiGLU and grouped-query attention, no biases.

    Nothing but the standard class is needed to load it again.
    """
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_embeddings,
        pad_token_id=pad_id,
        eos_token_id=eos_id,
        bos_token_id=None,
        architectures=["LlamaForCausalLM"],
    )


def count_parameters(config: LlamaConfig) -> int:
    """Trainable numbers of a model of this configuration; tied embeddings count once."""
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    attention = 2 * width * width + 2 * width * head * config.num_key_value_heads
    block = attention + 3 * width * config.intermediate_size + 2 * width
    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    return config.num_hidden_layers * block + embeddings + width
