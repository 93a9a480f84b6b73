"""What is kept of a step whose loss or gradient was no number."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from raylign.training.rows import Rows


def keep_rows(
    directory: Path,
    indices: np.ndarray,
    whole: Any,
    rows: Rows[Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the step's rows: `rows.npz`, the arrays as they were read, and `rows.jsonl`, a line for
    each with its number among the rows that are trained on, its text, and which rows of the user's
    file it was made of (from 1; none where that is not known)."""
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}
    np.savez(directory / "rows.npz", index=indices, **arrays)
    with (directory / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for index, tokens in zip(indices.tolist(), whole.tokens, strict=True):
            text = tokenizer.decode(tokens.reshape(-1))
            line = {"row": index, "source_rows": rows.trace(index), "text": text}
            stream.write(json.dumps(line) + "\n")
