"""Histograms of metrics of any shape: few bars, every threshold in sight, no bar that dwarfs all.

A histogram is JSON: `edges` [B + 1], `counts` [B], `kept` [B] or null, `zeros` (documents at
exactly 0 that are left out, or 0) and `above` (whether the last bar holds all that is larger).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

BARS = 40
# More than this share of documents at exactly 0 would flatten everything else.
_MANY_ZEROS = 0.5
# Whole numbers up to here get a bar each.
_FEW_VALUES = 30
# Bars end at this quantile, unless what is beyond it is near.
_TAIL, _NEAR = 0.995, 1.25


def bin_values(
    values: np.ndarray, kept: np.ndarray | None, marks: Sequence[float], whole: bool
) -> dict[str, Any]:
    """Histogram of `values` [n] (n > 0), and of those that are `kept` (bool [n]).

    `marks` are thresholds that the axis has to reach; `whole` numbers of a wide range get bars
    that double in width at every second edge.
    """
    zero = values == 0
    crowded = bool(zero.mean() > _MANY_ZEROS) and not zero.all()
    shown = values[~zero] if crowded else values
    stays = None if kept is None else (kept[~zero] if crowded else kept)
    edges = _choose_edges(shown, marks, whole)
    places = np.clip(np.searchsorted(edges, shown, "right") - 1, 0, len(edges) - 2)
    bars = len(edges) - 1
    return {
        "edges": [float(f"{edge:.6g}") for edge in edges],
        "counts": np.bincount(places, minlength=bars).tolist(),
        "kept": None if stays is None else np.bincount(places[stays], minlength=bars).tolist(),
        "zeros": int(zero.sum()) if crowded else 0,
        "above": bool(shown.max() > edges[-1]),
    }


def _choose_edges(values: np.ndarray, marks: Sequence[float], whole: bool) -> np.ndarray:
    low, high, top = float(values.min()), float(np.quantile(values, _TAIL)), float(values.max())
    if top <= _NEAR * high:
        high = top
    low, high = min([low, *marks]), max([high, *marks])
    if whole:
        if high - low <= _FEW_VALUES:
            return np.arange(np.floor(low), np.floor(high) + 2)
        first = 2 * np.floor(np.log2(max(low, 1.0)))
        last = 2 * np.ceil(np.log2(high + 1))
        powers = 2.0 ** (np.arange(first, last + 1) / 2)
        return powers if low >= 1 else np.concatenate([[0.0], powers])
    if high <= low:
        return np.array([low, low + (abs(low) or 1.0) * 0.1])
    if 0 <= low < 0.2 * high:
        low = 0.0
    # A threshold on an edge keeps what it rejects apart from what it lets pass.
    return np.linspace(low, high * (1 + 1e-6), BARS + 1)


def find_cuts(values: np.ndarray, shares: Sequence[float], least: bool) -> list[float]:
    """For each share, the threshold nearest to it that rejects at most that share of `values` [n].

    With `least` a rule rejects what is below its threshold, else what is above.
    """
    size = len(values)
    positions = [min(int(share * size), size - 1) for share in shares]
    if not least:
        positions = [size - 1 - position for position in positions]
    ordered = np.partition(values, sorted(set(positions)))
    return [float(ordered[position]) for position in positions]
