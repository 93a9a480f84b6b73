"""Which layers see a window only, where rows hold several texts.

transformers narrows its own masks to a layer's window, and takes a mask of ours as it is. So ours
is narrowed here: by the distance of positions, which count from where each text begins.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from raylign.config import UserError
from raylign.models.prompts import NAME

FULL, SLIDING = "full_attention", "sliding_attention"


def narrow_mask(
    lm: PreTrainedModel, mask: torch.Tensor, places: torch.Tensor | None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """`mask` bool [B, 1, T, T] as `lm`'s decoder takes it: itself where every layer sees all,
    narrowed where every layer sees a window, and by kind of layer where they differ.

    places: int64 [B, T], each token's position within its text; 0..T-1 when None. Raises
    `UserError` for layers that go by no mask.
    """
    text = lm.config.get_text_config()
    require_maskable(text)
    window = find_window(text)
    if window is None or mask.shape[-1] <= window:
        return mask
    if hasattr(lm, NAME):
        raise UserError(
            f"peft=prefix and peft=prompt on a {text.model_type}, whose layers see {window:,} "
            "tokens, take one text a row; set packing to false, or choose lora"
        )
    if places is None:
        places = torch.arange(mask.shape[-1], device=mask.device)[None]
    near = (places[:, :, None] - places[:, None, :] < window)[:, None]
    kinds = set(_list_kinds(text))
    if kinds == {FULL, SLIDING} or (kinds == {SLIDING} and _list_kinds(text)):
        return {FULL: mask, SLIDING: mask & near}
    return mask & near


def find_window(config: PreTrainedConfig) -> int | None:
    """Tokens, the query itself among them, that the layers with a window see; None without such."""
    text = config.get_text_config()
    window: int | None = getattr(text, "sliding_window", None)
    kinds = _list_kinds(text)
    return window if not kinds or SLIDING in kinds else None


def require_maskable(config: PreTrainedConfig) -> None:
    """Raises `UserError` for a model with layers that would carry something from one text of a row
    to the next, whatever a mask says."""
    text = config.get_text_config()
    others = sorted(set(_list_kinds(text)) - {FULL, SLIDING})
    if others:
        raise UserError(
            f"models of type {text.model_type} have layers of the kind {others[0]}, which keep the "
            "texts of a row apart by no mask; set packing (sft) or isolate_documents (pretrain) to "
            "false, or choose another model"
        )


def _list_kinds(text: PreTrainedConfig) -> tuple[str, ...]:
    """Of each layer; empty where all are alike and the configuration says nothing of it."""
    return tuple(getattr(text, "layer_types", None) or ())
