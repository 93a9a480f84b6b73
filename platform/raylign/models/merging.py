"""An adapter made part of its base, and the proof that nothing else changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from raylign.config import UserError
from raylign.models.folding import (
    attach_adapter,
    fold_into,
    read_form,
    read_quantization,
    require_plain,
)
from raylign.models.heads import build_scorer
from raylign.models.loading import DTYPES, load_config, load_model, load_tokenizer, save_model
from raylign.models.precision import narrow

_FOLDABLE = ("LORA", "VERA", "LOHA", "LOKR")
_HEADS = {"SEQ_CLS": "score", "TOKEN_CLS": "steps"}
_SEQUENCES, _LENGTH = 4, 64
_TOLERANCE = 1e-3
# Matrices in 8 bits are multiplied in 8 bits, too: not what their values give.
_TOLERANCE_INT8 = 5e-2


@dataclass(frozen=True, slots=True)
class MergeProof:
    """How far the merged model is from the adapted one, over a few random sequences."""

    difference: float
    """Largest |logit difference|, both in float32."""
    stored_difference: float
    """The same of the weights as they were stored."""
    largest_logit: float


def require_mergeable(adapter: Path) -> None:
    """Raises `UserError` for an adapter that changes something else than weights."""
    kind = str(read_form(adapter)["peft_type"])
    if kind not in _FOLDABLE:
        name = kind.removesuffix("_TUNING").lower()
        raise UserError(
            f"merge.adapter={adapter}: a {name} adapter is not a change of weights and cannot be "
            "folded into them; use the adapter as it is"
        )


def merge_adapter(adapter: Path, base: Path, output: Path, dtype: str | None) -> MergeProof:
    """Write the model in `base` with the adapter in `adapter` folded in to `output`, as `dtype`, or
    in the base's own type. A base that was quantised in training is quantised and dequantised.

    Raises `UserError` when base and adapter do not fit each other.
    """
    require_mergeable(adapter)
    require_plain(base)
    head = _HEADS.get(read_form(adapter).get("task_type") or "")
    lm = load_model(base) if head is None else build_scorer(base, head, 0)
    # Quantised weights keep the values that they had in training; all else is exact.
    attach_adapter(lm, adapter).float()
    tokens = _draw(lm)
    adapted = _compute(lm, tokens)
    merged = _compute(fold_into(lm).float(), tokens)
    largest = float(adapted.abs().max())
    difference = float((merged - adapted).abs().max())
    quantization = read_quantization(adapter) or {}
    tolerance = _TOLERANCE_INT8 if quantization.get("type") == "int8" else _TOLERANCE
    if not difference <= tolerance * max(1.0, largest):
        raise RuntimeError(
            f"the model merged from {adapter} differs by {difference:.1e} in its logits, of which "
            f"the largest is {largest:.1f}"
        )
    own = load_config(base).dtype
    narrow(lm, DTYPES[dtype] if dtype else own if isinstance(own, torch.dtype) else torch.float32)
    stored = float((_compute(lm, tokens) - adapted).abs().max())
    source = adapter if (adapter / "tokenizer_config.json").is_file() else base
    save_model(lm, lm.config, load_tokenizer(source), output)
    return MergeProof(difference, stored, largest)


def _draw(lm: PreTrainedModel) -> torch.Tensor:
    """Random tokens int64 [sequences, length], the same for the same vocabulary."""
    config = lm.config.get_text_config()
    length = min(_LENGTH, int(config.max_position_embeddings))
    stream = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, config.vocab_size, (_SEQUENCES, length), generator=stream)
    return drawn.to(lm.device)


@torch.no_grad()
def _compute(lm: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = lm.eval()(input_ids=tokens).logits.float()
    return logits
