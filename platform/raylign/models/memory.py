"""What a rank's memory will hold while it trains, from a model's blueprint.

Weights, gradients and optimizer state follow ZeRO's table (Rajbhandari et al., 2020, section 3).
Activations are what autograd keeps for the backward pass of these very models, operation by
operation in the manner of Korthikanti et al. (2022, section 4); attention keeps no scores where a
fused kernel computes it. Buffers of kernels and of communication, and fragmentation, come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from raylign.config import EngineConfig
from raylign.models.budget import Blueprint
from raylign.models.division import divide

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
    built: float = 0.0
    """In the CPU's memory while the model is built, before anything is shared out."""

    @property
    def device(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True, slots=True)
class _Part:
    """What of a model one rank computes with, before ZeRO shares out any of it."""

    numbers: float
    """Parameters."""
    layers: int
    alive: int
    """Micro-batches whose activations are kept at once."""
    ends: bool
    """With the head."""


def estimate(
    blueprint: Blueprint,
    trainable: int,
    engine: EngineConfig,
    data_ranks: int,
    sequences: int,
    length: int,
    isolate: bool,
    quantization: str | None = None,
    micro_batches: int = 1,
) -> Memory:
    """The memory of a rank that computes `sequences` rows of `length` tokens at once, and
    `micro_batches` such a step; of a pipeline's the one that needs most.

    `trainable` numbers learn; with fewer than all of them the others are frozen in the engine's
    type, or with `quantization` the blocks' matrices in that. With `isolate` attention goes by a
    mask of documents.
    """
    size = SIZES[engine.dtype]
    zero = engine.zero_stage if engine.backend == "deepspeed" else 0
    partners = data_ranks * engine.sequence_parallel  # those that ZeRO shares out to
    tokens = sequences * length / engine.sequence_parallel
    matrices = sum(m.parameters for m in blueprint.matrices)
    # Two moments in float32, and a float32 copy of weights that are not, or that ZeRO flattens.
    state = 12.0 if engine.dtype != "float32" or zero > 0 else 8.0

    # Float32, from which masters are made, and what is computed with; qlora reads no float32.
    built = size if quantization is not None else 4.0 + size * (size < 4)

    def weigh(part: _Part) -> Memory:
        learnt = part.numbers
        weights = size * part.numbers
        if trainable < blueprint.total:
            learnt = trainable * part.layers / blueprint.layers
            weights += size * learnt
            if quantization is not None:
                weights += (_QUANTISED[quantization] - size) * matrices * part.layers
        found = {
            "weights": weights / (partners if zero >= 3 else 1),
            "gradients": 4.0 * learnt / (partners if zero >= 2 else 1),
            "optimizer": state * learnt / (partners if zero >= 1 else 1),
        }
        moved = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "weights")}
        host = sum(found[name] for name in moved[engine.offload])
        found |= dict.fromkeys(moved[engine.offload], 0.0)
        kept = _keep(blueprint, engine, length, isolate, part.layers)
        return Memory(
            **found,
            activations=tokens * part.alive * kept,
            logits=_LOGIT_COPIES * _hold_logits(blueprint, tokens) if part.ends else 0.0,
            host=host,
            built=blueprint.total * built,
        )

    parts = _list_parts(blueprint, engine, micro_batches)
    return max((weigh(part) for part in parts), key=lambda found: found.device)


def _list_parts(blueprint: Blueprint, engine: EngineConfig, micro_batches: int) -> list[_Part]:
    """Of all stages of a pipeline, or of the whole.

    A stage runs ahead by as many micro-batches as stages follow it. Ranks that cut matrices keep
    embedding, head, norms and what is added after the cut whole.
    """
    matrices = sum(m.inputs * m.outputs for m in blueprint.matrices)
    biases = sum(m.parameters for m in blueprint.matrices) - matrices
    layer = matrices // engine.tensor_parallel + biases + blueprint.block_vectors
    head = blueprint.head + blueprint.final_vectors
    stages = engine.pipeline_parallel
    if stages == 1:
        numbers = blueprint.embedding + blueprint.layers * layer + head
        return [_Part(numbers, blueprint.layers, 1, True)]
    if blueprint.tied and not blueprint.scores:  # both ends hold it
        head += blueprint.vocab_size * blueprint.width
    costs = [layer] * blueprint.layers
    costs[0] += blueprint.embedding
    costs[-1] += head
    bounds = divide(costs, stages)
    return [
        _Part(
            sum(costs[first:last]),
            last - first,
            min(stages - stage, micro_batches),
            stage == stages - 1,
        )
        for stage, (first, last) in enumerate(pairwise(bounds))
    ]


def keep_block(
    blueprint: Blueprint, size: int, length: int, isolate: bool, tensor: int = 1
) -> float:
    """Bytes that one block keeps of a token, in rows of `length`; activations have `size` bytes.
    Of `tensor` ranks that cut its matrices each keeps a share of what they make, and all of the
    norms and of the mask."""
    width, heads = blueprint.width, blueprint.heads
    queries, keys = heads * blueprint.head_size, blueprint.kv_heads * blueprint.head_size
    whole = 0.0
    if blueprint.model_type in _EAGER:  # queries, keys, scores and probabilities in float32
        attention = 2 * queries * (4 + size) + heads * length * (4 if size == 4 else 4 + size)
    else:
        spread = queries if isolate else keys  # a mask makes keys and values as many as queries
        attention = size * 2 * (queries + spread) + 4 * heads
        whole = isolate * size * length
    if blueprint.gated:  # RMSNorm keeps its input in float32
        norms, inner = 2 * ((4 + 2 * size) * width + 4), 4
    else:
        norms, inner = blueprint.block_vectors // (2 * width) * (2 * size * width + 8), 5
    return norms + whole + (attention + size * inner * blueprint.inner) / tensor


def _keep(
    blueprint: Blueprint, engine: EngineConfig, length: int, isolate: bool, layers: int
) -> float:
    """Bytes of one token over `layers` blocks."""
    size = SIZES[engine.dtype]
    block = keep_block(blueprint, size, length, isolate, engine.tensor_parallel)
    if engine.activation_checkpointing:  # the inputs of all blocks, and one block computed again
        return layers * size * blueprint.width + block
    return layers * block


def _hold_logits(blueprint: Blueprint, tokens: float) -> float:
    if blueprint.scores:
        return 4 * tokens * blueprint.scores
    return min(LOGIT_BYTES, 4 * tokens * blueprint.vocab_size)
