"""Documents as vectors: the mean-pooled output of a Hugging Face encoder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from raylign.config import UserError

BATCH = 32


def embed(texts: list[str | None], model: Path, max_tokens: int) -> np.ndarray:
    """float32 [N, width]: the mean over each text's tokens (its first `max_tokens`) of the
    encoder's last layer, scaled to unit length. A null counts as an empty text.

    On the GPU where there is one. Raises `UserError` when the directory holds no encoder.
    """
    import torch

    tokenizer, encoder = _load(Path(model))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder.to(device)
    pieces = [np.empty((0, encoder.config.hidden_size), np.float32)]
    # Texts of a batch are padded to the longest: alike lengths waste little.
    order = sorted(range(len(texts)), key=lambda row: len(texts[row] or ""))
    for start in range(0, len(order), BATCH):
        batch = [texts[row] or "" for row in order[start : start + BATCH]]
        inputs = tokenizer(
            batch, truncation=True, max_length=max_tokens, padding=True, return_tensors="pt"
        )
        mask = inputs["attention_mask"].to(device)
        if mask.shape[1] == 0:  # nothing but empty texts
            pieces.append(np.zeros((len(batch), encoder.config.hidden_size), np.float32))
            continue
        with torch.inference_mode():
            hidden = encoder(
                input_ids=inputs["input_ids"].to(device), attention_mask=mask
            ).last_hidden_state.float()
        weight = mask[..., None].to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        pieces.append(torch.nn.functional.normalize(pooled, dim=1).cpu().numpy())
    vectors = np.concatenate(pieces)
    unsorted = np.empty_like(vectors)
    unsorted[order] = vectors
    return unsorted


@functools.lru_cache(maxsize=1)
def _load(model: Path) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        encoder = AutoModel.from_pretrained(model, local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"classifier.fit.embedding_model={model} cannot be loaded ({reason}); give the "
            "directory of a Hugging Face encoder"
        ) from None
    return tokenizer, encoder
