"""The metrics of many documents, from their Arrow buffers."""

from __future__ import annotations

import pyarrow as pa

from raylign.config import SignalsConfig
from raylign.data.quality import rules


def measure(table: pa.Table, config: SignalsConfig) -> pa.Table:
    """Metrics of every row of `table` (columns `text` and `url`), in the same order."""
    found = [rules.measure(text) for text in table["text"].to_pylist()]
    return pa.table(
        {
            "chars": pa.array([m.chars for m in found], pa.int32()),
            "alpha_share": pa.array([m.alpha_share for m in found], pa.float32()),
            "line_repeat_share": pa.array([m.line_repeat_share for m in found], pa.float32()),
            "mean_word_chars": pa.array([m.mean_word_chars for m in found], pa.float32()),
        }
    )
