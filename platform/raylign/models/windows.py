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
    require_separable(text, mask.shape[-1], getattr(getattr(lm, NAME, None), "kind", "none"))
    window = find_window(text)
    if window is None or mask.shape[-1] <= window:
        return mask
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


def require_separable(
    config: PreTrainedConfig, length: int, peft: str = "none", key: str = "packing"
) -> None:
    """Raises `UserError`, which names the `key` to set to false, for a model that cannot keep apart
    the texts of a row of `length` tokens: with layers that carry something on whatever a mask says,
    or with virtual tokens in front of a window."""
    text = config.get_text_config()
    if others := _list_others(text):
        raise UserError(
            f"models of type {text.model_type} have layers of the kind {others[0]}, which keep the "
            f"texts of a row apart by no mask; set {key} to false, or choose another model"
        )
    window = find_window(text)
    if peft in ("prefix", "prompt") and window is not None and length > window:
        raise UserError(
            f"peft={peft} on a {text.model_type}, whose layers see {window:,} tokens, takes one "
            f"text a row of {length:,}; set {key} to false, or choose lora"
        )


def goes_by_masks(config: PreTrainedConfig) -> bool:
    """Whether a mask decides what every layer sees."""
    return not _list_others(config.get_text_config())


def _list_others(text: PreTrainedConfig) -> list[str]:
    return sorted(set(_list_kinds(text)) - {FULL, SLIDING})


def _list_kinds(text: PreTrainedConfig) -> tuple[str, ...]:
    """Of each layer; empty where all are alike and the configuration says nothing of it."""
    return tuple(getattr(text, "layer_types", None) or ())
