"""What a model amounts to, from its `config.json` alone: parameters, floating-point operations.

A block's matrices are listed by name, so what an adapter adds to them follows as well. Nothing
heavy is imported here: a plan is made before any model is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from raylign.config import AdapterConfig, UserError
from raylign.config.training import PeftKind

FOLDABLE: tuple[PeftKind, ...] = ("lora", "qlora", "dora", "loraplus", "vera", "loha")
"""Adapters that can be folded into the weights they adapt."""
CHINCHILLA = 20
"""Training tokens a parameter at which model and data grow together (Hoffmann et al., 2022)."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear map, one in each block."""

    name: str
    """As its module is called within the block, which adapters go by."""
    part: Literal["attention", "mlp"]
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + self.outputs * self.bias


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A decoder as the numbers that its cost depends on."""

    model_type: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    """Width inside the feed-forward block."""
    context: int
    matrices: tuple[Matrix, ...]
    """Of one block."""
    block_vectors: int
    """Numbers of a block outside its matrices: norms."""
    final_vectors: int
    """Numbers of the last norm."""
    learned_positions: int = 0
    """Rows of a table of positions."""
    tied: bool = False
    """The head is the embedding."""
    head_bias: bool = False
    gated: bool = True
    """The feed-forward block multiplies two projections (SwiGLU)."""
    scores: int = 0
    """Outputs of a head that stands in place of the vocabulary's; 0 for that."""

    @property
    def embedding(self) -> int:
        """Numbers in tables that are looked up."""
        return (self.vocab_size + self.learned_positions) * self.width

    @property
    def head(self) -> int:
        """Numbers of the output embedding, beyond those it shares."""
        if self.scores:
            return self.scores * (self.width + self.head_bias)
        own = 0 if self.tied else self.vocab_size * self.width
        return own + self.vocab_size * self.head_bias

    @property
    def non_embedding(self) -> int:
        """Parameters of the blocks and the last norm, the N of Kaplan et al. (2020)."""
        matrices = sum(matrix.parameters for matrix in self.matrices)
        return self.layers * (matrices + self.block_vectors) + self.final_vectors

    @property
    def total(self) -> int:
        """All trainable numbers; tied embeddings count once."""
        return self.embedding + self.head + self.non_embedding

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied with: all but tables that are looked up."""
        if self.scores:
            return self.non_embedding + self.head
        return self.non_embedding + self.vocab_size * (self.width + self.head_bias)


def count(fields: Mapping[str, Any], source: str = "config.json") -> Blueprint:
    """The blueprint of a causal language model whose `config.json` holds `fields`.

    Raises `UserError`, which names `source`, for a family that is not known here, or one that lacks
    a field.
    """
    kind = str(fields.get("model_type"))
    if kind not in _FAMILIES:
        raise UserError(
            f"{source}: the parameters of model_type={kind!r} cannot be counted; those of "
            f"{', '.join(_FAMILIES)} can"
        )
    try:
        return _FAMILIES[kind](fields)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{source}: not a {kind} configuration ({error!r}); correct it") from None


def count_flops(blueprint: Blueprint, sequence: int) -> float:
    """Floating-point operations to train on one token, in rows of `sequence` tokens.

    6 N + 12 L H Q T (Chowdhery et al., 2022, "PaLM", appendix B, after Kaplan et al., 2020): a
    multiplication and an addition for each of the N parameters forward, twice that backward; and
    the attention scores and their sums, as if no position were masked. N leaves out tables that
    are looked up. Recomputed activations are not counted: this is what model FLOPs utilisation
    divides by.
    """
    width = blueprint.heads * blueprint.head_size
    return 6.0 * blueprint.multiplied + 12.0 * blueprint.layers * width * sequence


def count_adapter(
    blueprint: Blueprint, kind: PeftKind, adapter: AdapterConfig, key: str = "adapter"
) -> int:
    """Trainable numbers when `kind` adapts the model; all of them for `none`.

    Raises `UserError`, which names `key`, for a target that the model does not have, or a kind that
    does not work on its matrices.
    """
    if kind == "none":
        return blueprint.total
    if kind in ("prefix", "prompt"):
        length = adapter.virtual_tokens or 16
        if kind == "prompt":
            return length * blueprint.width
        return length * blueprint.layers * 2 * blueprint.kv_heads * blueprint.head_size
    if kind == "loha" and blueprint.model_type == "gpt2":
        raise UserError(
            f"{key}: peft has no loha for the matrices of a {blueprint.model_type}; use lora or "
            "dora"
        )
    rank = adapter.rank or {"vera": 64, "loha": 8}.get(kind, 16)
    times = _choose(blueprint, adapter.targets, key)
    return sum(
        count * _adapt(matrix, kind, rank)
        for matrix, count in zip(blueprint.matrices, times, strict=True)
    )


def _adapt(matrix: Matrix, kind: PeftKind, rank: int) -> int:
    """Numbers that one matrix [outputs, inputs] gets."""
    low_rank = rank * (matrix.inputs + matrix.outputs)
    if kind == "vera":  # the two projections are drawn once and stay
        return rank + matrix.outputs
    if kind == "loha":  # the product of two low-rank updates
        return 2 * low_rank
    return low_rank + (matrix.outputs if kind == "dora" else 0)  # dora learns each row's length


def _choose(blueprint: Blueprint, targets: tuple[str, ...] | str, key: str) -> list[int]:
    """In how many blocks each matrix is adapted; names count from their end, as peft has it."""
    if isinstance(targets, str):
        return [blueprint.layers * (targets in ("all-linear", m.part)) for m in blueprint.matrices]
    prefix = "layers" if blueprint.model_type not in ("gptj", "gpt2") else "h"
    names = [
        [f"{prefix}.{layer}.{matrix.name}" for layer in range(blueprint.layers)]
        for matrix in blueprint.matrices
    ]
    for target in targets:
        if not any(_ends(name, target) for same in names for name in same):
            raise UserError(
                f"{key}.targets: a {blueprint.model_type} has no {target!r}; it has "
                f"{', '.join(m.name for m in blueprint.matrices)}"
            )
    return [sum(any(_ends(n, t) for t in targets) for n in same) for same in names]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _read_llama(fields: Mapping[str, Any]) -> Blueprint:
    """Llama, and those that differ from it by biases and norms of heads."""
    kind = fields["model_type"]
    width, heads = int(fields["hidden_size"]), int(fields["num_attention_heads"])
    kv_heads = int(fields.get("num_key_value_heads") or heads)
    size = int(fields.get("head_dim") or width // heads)
    inner = int(fields["intermediate_size"])
    biased = bool(fields.get("attention_bias", False))
    qkv = kind == "qwen2" or biased
    mlp = bool(fields.get("mlp_bias", False))
    matrices = (
        Matrix("self_attn.q_proj", "attention", width, heads * size, qkv),
        Matrix("self_attn.k_proj", "attention", width, kv_heads * size, qkv),
        Matrix("self_attn.v_proj", "attention", width, kv_heads * size, qkv),
        Matrix("self_attn.o_proj", "attention", heads * size, width, biased),
        Matrix("mlp.gate_proj", "mlp", width, inner, mlp),
        Matrix("mlp.up_proj", "mlp", width, inner, mlp),
        Matrix("mlp.down_proj", "mlp", inner, width, mlp),
    )
    return Blueprint(
        model_type=kind,
        vocab_size=int(fields["vocab_size"]),
        width=width,
        layers=int(fields["num_hidden_layers"]),
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        inner=inner,
        context=int(fields["max_position_embeddings"]),
        matrices=matrices,
        block_vectors=2 * width + (2 * size if kind == "qwen3" else 0),
        final_vectors=width,
        tied=bool(fields.get("tie_word_embeddings", False)),
    )


def _read_gptj(fields: Mapping[str, Any]) -> Blueprint:
    """One norm a block: attention and feed-forward read the same input."""
    width, heads = int(fields["n_embd"]), int(fields["n_head"])
    inner = int(fields.get("n_inner") or 4 * width)
    attention = [
        Matrix(f"attn.{name}", "attention", width, width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    return Blueprint(
        model_type="gptj",
        vocab_size=int(fields["vocab_size"]),
        width=width,
        layers=int(fields["n_layer"]),
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        inner=inner,
        context=int(fields["n_positions"]),
        matrices=(
            *attention,
            Matrix("mlp.fc_in", "mlp", width, inner, True),
            Matrix("mlp.fc_out", "mlp", inner, width, True),
        ),
        block_vectors=2 * width,
        final_vectors=2 * width,
        tied=bool(fields.get("tie_word_embeddings", False)),
        head_bias=True,
        gated=False,
    )


def _read_gpt2(fields: Mapping[str, Any]) -> Blueprint:
    """Learned positions, queries, keys and values in one matrix."""
    width, heads = int(fields["n_embd"]), int(fields["n_head"])
    inner = int(fields.get("n_inner") or 4 * width)
    context = int(fields["n_positions"])
    return Blueprint(
        model_type="gpt2",
        vocab_size=int(fields["vocab_size"]),
        width=width,
        layers=int(fields["n_layer"]),
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        inner=inner,
        context=context,
        matrices=(
            Matrix("attn.c_attn", "attention", width, 3 * width, True),
            Matrix("attn.c_proj", "attention", width, width, True),
            Matrix("mlp.c_fc", "mlp", width, inner, True),
            Matrix("mlp.c_proj", "mlp", inner, width, True),
        ),
        block_vectors=4 * width,
        final_vectors=2 * width,
        learned_positions=context,
        tied=bool(fields.get("tie_word_embeddings", True)),
        gated=False,
    )


_FAMILIES: dict[str, Callable[[Mapping[str, Any]], Blueprint]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _read_llama),
    "gptj": _read_gptj,
    "gpt2": _read_gpt2,
}
