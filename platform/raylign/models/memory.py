"""What a rank's memory will hold while it trains, from a model's blueprint.

Weights, gradients and optimizer state follow ZeRO's table (Rajbhandari et al., 2020, section 3).
Activations are what autograd keeps for the backward pass of these very models, operation by
operation in the manner of Korthikanti et al. (2022, section 4); attention keeps no scores where a
fused kernel computes it. Buffers of kernels and of communication, and fragmentation, come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from raylign.config import EngineConfig
from raylign.models.budget import Blueprint

SIZES = {"float32": 4, "bfloat16": 2}
LOGIT_BYTES = 64 * 2**20
"""Float32 logits held at once; smaller pieces of them are made again in the backward pass."""
# Logits, their exponentials and their gradient stand side by side.
_LOGIT_COPIES = 3
# Families whose attention is written out, so that its scores are kept.
_EAGER = ("gptj",)
# Bytes of a weight quantised in blocks of 64, with its share of twice quantised block sizes
# (Dettmers et al., 2023, "QLoRA", section 3); int8 has a float32 a row.
_QUANTISED = {"nf4": 0.516, "fp4": 0.516, "int8": 1.0}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes a rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    host: float = 0.0
    """In the CPU's memory in place of the device's."""

    @property
    def device(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate(
    blueprint: Blueprint,
    trainable: int,
    engine: EngineConfig,
    data_ranks: int,
    sequences: int,
    length: int,
    isolate: bool,
    quantization: str | None = None,
) -> Memory:
    """The memory of a rank that computes `sequences` rows of `length` tokens at once.

    `trainable` numbers learn; with fewer than all of them the others are frozen in the engine's
    type, or with `quantization` the blocks' matrices in that. With `isolate` attention goes by a
    mask of documents.
    """
    size = SIZES[engine.dtype]
    shared = engine.tensor_parallel * engine.pipeline_parallel
    zero = engine.zero_stage if engine.backend == "deepspeed" else 0
    partners = data_ranks * engine.sequence_parallel  # those that ZeRO shares out to

    def share(amount: float, stage: int) -> float:
        return amount / shared / (partners if zero >= stage else 1)

    weights = float(size * blueprint.total)
    if trainable < blueprint.total:
        weights += size * trainable
        if quantization is not None:
            matrices = blueprint.layers * sum(m.parameters for m in blueprint.matrices)
            weights += (_QUANTISED[quantization] - size) * matrices
    # Two moments in float32, and a float32 copy of weights that are not, or that ZeRO flattens.
    copied = engine.dtype != "float32" or zero > 0
    found = {
        "weights": share(weights, 3),
        "gradients": share(4.0 * trainable, 2),
        "optimizer": share((8.0 + 4.0 * copied) * trainable, 1),
    }
    moved = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "weights")}
    host = sum(found[name] for name in moved[engine.offload])
    found |= dict.fromkeys(moved[engine.offload], 0.0)
    tokens = sequences * length / engine.sequence_parallel
    return Memory(
        **found,
        activations=tokens * _keep(blueprint, engine, length, isolate),
        logits=_LOGIT_COPIES * _hold_logits(blueprint, tokens),
        host=host,
    )


def keep_block(blueprint: Blueprint, size: int, length: int, isolate: bool) -> float:
    """Bytes that one block keeps of a token, in rows of `length`; activations have `size` bytes."""
    width, heads = blueprint.width, blueprint.heads
    queries, keys = heads * blueprint.head_size, blueprint.kv_heads * blueprint.head_size
    if blueprint.model_type in _EAGER:  # queries, keys, scores and probabilities in float32
        attention = 2 * queries * (4 + size) + heads * length * (4 if size == 4 else 4 + size)
    else:
        spread = queries if isolate else keys  # a mask makes keys and values as many as queries
        attention = size * 2 * (queries + spread) + 4 * heads + isolate * size * length
    if blueprint.gated:  # RMSNorm keeps its input in float32
        norms, inner = 2 * ((4 + 2 * size) * width + 4), 4
    else:
        norms, inner = blueprint.block_vectors // (2 * width) * (2 * size * width + 8), 5
    return norms + attention + size * inner * blueprint.inner


def _keep(blueprint: Blueprint, engine: EngineConfig, length: int, isolate: bool) -> float:
    """Bytes of one token on one rank, over the blocks that the rank computes."""
    size = SIZES[engine.dtype]
    block = keep_block(blueprint, size, length, isolate) / engine.tensor_parallel
    layers = -(-blueprint.layers // engine.pipeline_parallel)
    if engine.activation_checkpointing:  # the inputs of all blocks, and one block computed again
        return layers * size * blueprint.width + block
    return layers * block


def _hold_logits(blueprint: Blueprint, tokens: float) -> float:
    if blueprint.scores:
        return 4 * tokens * blueprint.scores
    return min(LOGIT_BYTES, 4 * tokens * blueprint.vocab_size)
