"""Shapes of models to initialise."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from raylign.config.presets import PRESETS, suggest_preset
from raylign.config.section import Count, Section


class RopeScalingConfig(Section):
    """Llama 3.1's stretching of rotary frequencies for contexts beyond the trained one."""

    factor: float = Field(default=8.0, ge=1)
    """How much longer the context becomes."""
    low_frequency: float = Field(default=1.0, gt=0)
    """Waves of which the original context holds fewer turns are stretched by the whole factor."""
    high_frequency: float = Field(default=4.0, gt=0)
    """Waves of which it holds more turns stay as they are."""
    original_context: Count = 8192
    """The context before stretching, in tokens."""


class ModelConfig(Section):
    """A decoder to initialise, as a plain Hugging Face configuration."""

    preset: str | None = None
    """A row of `raylign.config.presets`, whose values hold for the keys that are not given."""
    family: Literal["llama", "gptj"] = "llama"
    """`llama`: RoPE, RMSNorm, SwiGLU, grouped queries; `gptj`: attention and feed-forward side by
    side, LayerNorm, GELU."""
    vocab_size: Count | None = None
    """Rows of the embedding, at least the tokenizer's; as many as the tokenizer when not given."""
    hidden_size: Count = 128
    """Width of the residual stream."""
    layers: Count = 4
    """Decoder blocks."""
    heads: Count = 4
    """Query heads; must divide `hidden_size`."""
    kv_heads: Count = 2
    """llama: key/value heads; must divide `heads`."""
    ffn_size: Count = 384
    """Inner width of the feed-forward block."""
    context: Count = 512
    """Longest sequence, in tokens."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """llama: base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """llama: rotary frequencies stretched for a long context."""
    rotary_dim: Count | None = None
    """gptj: leading dimensions of a head that are rotated; all when not given."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Added to the variance that a norm divides by."""
    tie_embeddings: bool = True
    """Share the input and output embedding."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(name := given.get("preset"), str):
            return {**PRESETS.get(name, {}), **given}
        return given

    @field_validator("preset")
    @classmethod
    def _check_preset(cls, name: str | None) -> str | None:
        if name is not None and name not in PRESETS:
            raise ValueError(f"no preset of this name; {suggest_preset(name)}")
        return name

    @model_validator(mode="after")
    def _check_shape(self) -> ModelConfig:
        if self.hidden_size % self.heads:
            raise ValueError(f"heads={self.heads} must divide hidden_size={self.hidden_size}")
        foreign = {"llama": ("rotary_dim",), "gptj": ("kv_heads", "rope_theta", "rope_scaling")}
        for key in foreign[self.family]:
            if key in self.model_fields_set and getattr(self, key) is not None:
                raise ValueError(f"{key} has no effect with family={self.family}; leave it out")
        head = self.hidden_size // self.heads
        if self.family == "llama":
            if self.heads % self.kv_heads:
                raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
            if head % 2:
                raise ValueError(f"heads are {head} wide; RoPE rotates pairs, so make it even")
        elif (rotated := self.rotary_dim or head) > head or rotated % 2:
            raise ValueError(f"rotary_dim={rotated} must be even and at most a head's {head}")
        if self.tie_embeddings and self.family == "gptj":
            raise ValueError(
                "tie_embeddings: the head of a gptj has a bias of its own; set it to false"
            )
        return self
