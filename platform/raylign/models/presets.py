"""From a shape in a recipe to a plain transformers configuration."""

from __future__ import annotations

from transformers import AutoConfig, PreTrainedConfig

from raylign.config import ModelConfig, UserError
from raylign.models.budget import count
from raylign.models.catalog import write_fields


def build_config(
    shape: ModelConfig, vocab_size: int, *, pad_id: int, eos_id: int
) -> PreTrainedConfig:
    """A decoder of this shape for a tokenizer of `vocab_size` entries.

    Nothing but the family's standard class is needed to load it again. Raises `UserError` when the
    shape fixes a vocabulary that is too small.
    """
    if shape.vocab_size is not None and shape.vocab_size < vocab_size:
        by = f"preset {shape.preset}" if shape.preset else "the shape"
        raise UserError(
            f"the tokenizer has {vocab_size:,} entries and {by} has vocab_size="
            f"{shape.vocab_size:,}; choose the model's own tokenizer, or give another vocab_size"
        )
    fields = write_fields(shape, vocab_size)
    return AutoConfig.for_model(
        fields.pop("model_type"),
        **fields,
        pad_token_id=pad_id,
        eos_token_id=eos_id,
        bos_token_id=None,
    )


def count_parameters(config: PreTrainedConfig) -> int:
    """Trainable numbers of a model of this configuration; tied embeddings count once."""
    return count(config.to_dict()).total
