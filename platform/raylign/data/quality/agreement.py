"""How well scores agree with labels, and the scale that makes them agree best."""

from __future__ import annotations

from typing import Any

import numpy as np


def calibrate(raw: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Slope and shift of the least-squares line from raw scores [N] to labels [N].

    (1, 0) where the line does not rise, which would turn the ranking round, or where the raw
    scores are all equal.
    """
    spread = float(np.var(raw))
    if spread <= 1e-12:
        return 1.0, 0.0
    slope = float(np.mean((raw - raw.mean()) * (labels - labels.mean()))) / spread
    if slope <= 0:
        return 1.0, 0.0
    return slope, float(labels.mean() - slope * raw.mean())


def compare_scores(
    scores: np.ndarray, labels: np.ndarray, threshold: float, limits: tuple[float, float]
) -> dict[str, Any]:
    """Agreement of scores [N] with labels [N].

    `pearson`, `spearman` (null when either side is constant), `mean_absolute_error`, and for the
    question whether a document reaches `threshold`: `accuracy`, `precision`, `recall`, `f1` (each
    null when it has no denominator). `calibration` lists, for each unit of the score, how many
    documents have such a score and the mean score and label among them.
    """
    found, wanted = scores >= threshold, labels >= threshold
    hits = int(np.sum(found & wanted))
    return {
        "pearson": _correlate(scores, labels),
        "spearman": _correlate(_rank(scores), _rank(labels)),
        "mean_absolute_error": float(np.mean(np.abs(scores - labels))),
        "threshold": threshold,
        "good_labels": int(np.sum(wanted)),
        "accuracy": float(np.mean(found == wanted)),
        "precision": _divide(hits, int(np.sum(found))),
        "recall": _divide(hits, int(np.sum(wanted))),
        "f1": _divide(2 * hits, int(np.sum(found)) + int(np.sum(wanted))),
        "calibration": _bins(scores, labels, limits),
    }


def _bins(
    scores: np.ndarray, labels: np.ndarray, limits: tuple[float, float]
) -> list[dict[str, float]]:
    low, high = limits
    count = max(1, min(10, round(high - low))) if high - low > 1 else 5
    place = np.clip(((scores - low) / (high - low) * count).astype(int), 0, count - 1)
    rows = []
    for index in range(count):
        inside = place == index
        if inside.any():
            rows.append(
                {
                    "from": low + (high - low) * index / count,
                    "documents": int(inside.sum()),
                    "score": float(scores[inside].mean()),
                    "label": float(labels[inside].mean()),
                }
            )
    return rows


def _correlate(a: np.ndarray, b: np.ndarray) -> float | None:
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return float(np.sum(a * b)) / scale if scale > 1e-12 else None


def _rank(values: np.ndarray) -> np.ndarray:
    """float64 [N]: ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def _divide(part: int, whole: int) -> float | None:
    return part / whole if whole else None
