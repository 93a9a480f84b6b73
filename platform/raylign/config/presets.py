"""Shapes with a name: what `preset` fills in where a recipe is silent. Keys are `ModelConfig`'s."""

from __future__ import annotations

import difflib
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # For tests and for trying a recipe out.
    "tiny": {
        "hidden_size": 64,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "ffn_size": 128,
        "context": 256,
    },
    "tiny-gptj": {
        "family": "gptj",
        "hidden_size": 64,
        "layers": 2,
        "heads": 4,
        "ffn_size": 128,
        "context": 256,
        "rotary_dim": 8,
        "norm_eps": 1e-5,
        "tie_embeddings": False,
    },
    # The size of nanoGPT's model of characters (10.6 M); 8/3 of the width makes a SwiGLU block as
    # large as the usual one of 4.
    "shakespeare-char": {
        "hidden_size": 384,
        "layers": 6,
        "heads": 6,
        "kv_heads": 6,
        "ffn_size": 1024,
        "context": 256,
    },
    # GPT-2 small (Radford et al., 2019) in today's form; what grouped queries save is spent on the
    # feed-forward block, which brings it to 124.8 M with a vocabulary of 50,304.
    "gpt2-125m": {
        "hidden_size": 768,
        "layers": 12,
        "heads": 12,
        "kv_heads": 4,
        "ffn_size": 2432,
        "context": 1024,
    },
    # GPT-J (Wang and Komatsuzaki, 2021).
    "gptj-6b": {
        "family": "gptj",
        "vocab_size": 50_400,
        "hidden_size": 4096,
        "layers": 28,
        "heads": 16,
        "ffn_size": 16_384,
        "context": 2048,
        "rotary_dim": 64,
        "norm_eps": 1e-5,
        "tie_embeddings": False,
    },
    # Llama 3.1 (Grattafiori et al., 2024, table 3).
    "llama-3.1-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "ffn_size": 14_336,
        "context": 131_072,
        "rope_theta": 500_000.0,
        "rope_scaling": {"factor": 8.0, "original_context": 8192},
        "norm_eps": 1e-5,
        "tie_embeddings": False,
    },
}


def suggest_preset(name: str) -> str:
    """The nearest name, or all of them; the end of a complaint about `name`."""
    close = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return f"there are {', '.join(PRESETS)}"
