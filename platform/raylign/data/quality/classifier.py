"""A quality classifier: ridge regression from a document's words to the score a judge would give.

The idea is FineWeb-Edu's (Penedo et al. 2024): label a sample with a strong model, fit something
cheap, score everything. Cheap is here a linear model over hashed words and pairs of neighbouring
words, with damped counts and unit length, which reads Arrow buffers and needs no accelerator;
or, when an encoder is given, over its mean-pooled output.

A fitted classifier is a directory: `classifier.json` (settings, quality on held-out labels, hash)
and `weights.npy`. Its scores are a function of these and the text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import xxhash

from raylign.config import UserError
from raylign.config.synthesis import FitConfig
from raylign.data.quality.agreement import calibrate, compare_scores
from raylign.data.words import kernel, mix, split_words
from raylign.run import content_hash, hash_json, write_json
from raylign.runtime import derive_seed

CARD = "classifier.json"
WEIGHTS = "weights.npy"
MIN_LABELS = 50

# Documents whose words are held in memory at once.
_ROWS = 1024
# Counts above this weigh no more; 1 + ln(1023) is 7.9.
_MAX_COUNT = 1024

Texts: TypeAlias = "list[str] | pa.Array | pa.ChunkedArray"

_loaded: dict[tuple[Path, str], Classifier] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """Weights, and everything that says how to use them."""

    weights: np.ndarray
    """float32 [2^bits] of hashed words, or [width] of an encoder's output; read-only."""
    intercept: float
    config: FitConfig
    metrics: dict[str, Any]
    """Quality on held-out labels; see `raylign.data.quality.agreement`."""
    content: str
    """Hash of weights and settings: equal ones give equal scores."""

    def score(self, texts: Texts) -> np.ndarray:
        """float32 [N]: a score within `config.score_range` for every text.

        A text without any word has the lowest score. Does not depend on which texts come together
        (up to rounding where an encoder is used).
        """
        low, high = self.config.score_range
        if self.config.embedding_model is not None:
            vectors = _embed(texts, self.config)
            return np.clip(vectors @ self.weights + np.float32(self.intercept), low, high)
        pieces = []
        levels = _levels(self.config)
        for start in range(0, len(texts), _ROWS):
            words = split_words(texts[start : start + _ROWS])
            scores = np.empty(len(words.offsets) - 1, np.float32)
            _score(
                words.hashes,
                words.offsets,
                self.weights,
                np.float64(self.intercept),
                self.config.bits,
                self.config.ngrams,
                levels,
                np.float64(low),
                np.float64(high),
                scores,
            )
            pieces.append(scores)
        return np.concatenate(pieces) if pieces else np.empty(0, np.float32)

    def save(self, directory: Path) -> None:
        """Write the classifier into `directory`, the card last."""
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / WEIGHTS, self.weights, allow_pickle=False)
        card = {
            "fit": self.config.model_dump(mode="json"),
            "intercept": self.intercept,
            "metrics": self.metrics,
            "weights": _hash_weights(self.weights),
            "content": self.content,
        }
        write_json(directory / CARD, card)


def load(path: Path | str) -> Classifier:
    """The classifier in directory `path`, such as a `classifier` stage; its weights are mapped.

    Cheap to call for every batch: a process keeps what it has loaded by path and content hash.
    Raises `UserError` when there is none, or it is damaged.
    """
    path = Path(path).absolute()
    try:
        card = json.loads((path / CARD).read_text(encoding="utf-8"))
        key = (path, card["content"])
        if key not in _loaded:
            weights = np.load(path / WEIGHTS, mmap_mode="r", allow_pickle=False)
            if _hash_weights(weights) != card["weights"]:
                raise ValueError(f"{WEIGHTS} is not the one that was saved")
            config = FitConfig.model_validate(card["fit"])
            _loaded[key] = Classifier(
                # A plain view: compiled once for fitted and loaded weights alike.
                weights.view(np.ndarray),
                float(card["intercept"]),
                config,
                card["metrics"],
                card["content"],
            )
        return _loaded[key]
    except FileNotFoundError as error:
        raise UserError(
            f"{path} holds no classifier ({Path(error.filename).name} is missing); "
            "fit one with `python -m jobs.classifier`"
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"classifier {path} is damaged ({reason}); fit it again") from None


def fit(
    texts: Texts, labels: Sequence[float] | np.ndarray, config: FitConfig, seed: int
) -> Classifier:
    """Fit scores to `labels`, one a text, and measure the result on labels held out.

    Three disjoint random parts: one fits the weights, one sets the scale (regression to the mean
    makes ridge scores too timid), one is only measured on. Deterministic.
    Raises `UserError` for too few labels, all equal, or outside `config.score_range`.
    """
    values = np.asarray(labels, np.float64)
    _check_labels(values, len(texts), config)
    if isinstance(texts, list):
        texts = pa.array(texts, pa.large_string())
    order = np.random.default_rng(derive_seed(seed, "classifier", "split")).permutation(len(values))
    held = max(1, round(config.held_out_share * len(values)))
    aside = max(1, round(config.calibration_share * len(values)))
    parts = order[:held], order[held : held + aside], order[held + aside :]
    held_out, scale, train = (np.sort(part) for part in parts)
    if len(np.unique(values[train])) < 2:
        raise UserError("classifier: all labels are equal; there is nothing to learn from them")
    features = _features(texts, config)
    weights, intercept = _solve(features[train], values[train], config.ridge)
    slope, shift = calibrate(features[scale] @ weights + intercept, values[scale])
    weights = (weights * slope).astype(np.float32)
    weights.setflags(write=False)
    intercept = float(intercept * slope + shift)
    scores = np.clip(features[held_out] @ weights + intercept, *config.score_range)
    metrics = compare_scores(scores, values[held_out], config.threshold, config.score_range)
    metrics |= {
        "labels": {"fitted": len(train), "calibrated": len(scale), "held_out": len(held_out)},
        "slope": slope,
    }
    encoder = config.embedding_model
    content = hash_json(
        {
            "fit": config.model_dump(mode="json", exclude={"embedding_model"}),
            "encoder": None if encoder is None else content_hash(encoder),
            "intercept": intercept,
            "weights": _hash_weights(weights),
        }
    )
    return Classifier(weights, intercept, config, metrics, content)


def _check_labels(values: np.ndarray, texts: int, config: FitConfig) -> None:
    if len(values) != texts:
        raise ValueError(f"{texts} texts and {len(values)} labels")
    low, high = config.score_range
    if not low < high or not low < config.threshold <= high:
        raise UserError(
            f"classifier.fit.score_range={low:g}, {high:g}: must rise, and hold "
            f"threshold={config.threshold:g}"
        )
    if len(values) < MIN_LABELS:
        raise UserError(
            f"classifier: {len(values)} labelled documents are too few to fit and measure on; "
            f"give at least {MIN_LABELS}"
        )
    bad = np.flatnonzero(~((values >= low) & (values <= high)))
    if len(bad):
        raise UserError(
            f"classifier: label {values[bad[0]]:g} of document {bad[0]} is outside "
            f"classifier.fit.score_range={low:g}, {high:g}; set the range, or mend the label"
        )


def _solve(features: Any, labels: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    """Ridge regression: the weights and intercept that minimise the sum of squared errors plus
    `strength` times the sum of squared weights."""
    from sklearn.linear_model import Ridge

    dense = isinstance(features, np.ndarray)
    model = Ridge(alpha=strength, solver="cholesky" if dense else "sparse_cg", tol=1e-5)
    model.fit(features, labels)
    return np.asarray(model.coef_, np.float64), float(model.intercept_)


def _features(texts: pa.Array | pa.ChunkedArray, config: FitConfig) -> Any:
    """One row a text: scipy CSR of hashed words, or a dense array from the encoder."""
    if config.embedding_model is not None:
        return _embed(texts, config).astype(np.float64)
    from scipy.sparse import csr_matrix, vstack

    blocks = []
    for start in range(0, len(texts), _ROWS):
        words = split_words(texts[start : start + _ROWS])
        room = config.ngrams * len(words.hashes)
        columns, values = np.empty(room, np.int32), np.empty(room, np.float32)
        bounds = np.zeros(len(words.offsets), np.int64)
        levels = _levels(config)
        used = _fill(
            words.hashes,
            words.offsets,
            config.bits,
            config.ngrams,
            levels,
            columns,
            values,
            bounds,
        )
        shape = (len(bounds) - 1, 1 << config.bits)
        blocks.append(csr_matrix((values[:used].copy(), columns[:used].copy(), bounds), shape))
    return vstack(blocks, format="csr")


def _embed(texts: Texts, config: FitConfig) -> np.ndarray:
    from raylign.data.quality.embedding import embed

    assert config.embedding_model is not None
    rows: list[str | None] = [*texts] if isinstance(texts, list) else texts.to_pylist()
    return embed(rows, config.embedding_model, config.embedding_tokens)


def _levels(config: FitConfig) -> np.ndarray:
    """float32 [_MAX_COUNT]: what a feature that occurs so many times weighs before scaling."""
    counts = np.arange(_MAX_COUNT)
    damped = 1 + np.log(np.maximum(counts, 1)) if config.frequency == "log" else counts**0
    return np.where(counts > 0, damped, 0).astype(np.float32)


def _hash_weights(weights: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(weights).tobytes())


@kernel
def _count(hashes, start, stop, bits, ngrams, counts, touched):
    """Count the features of one document in `counts`; their columns, in order of appearance, come
    into `touched`, and how many there are is returned."""
    mask = np.uint64((1 << bits) - 1)
    found = 0
    for i in range(start, stop):
        value = hashes[i]
        for n in range(ngrams):
            if n == 1:
                if i + 1 == stop:
                    break
                value = mix(value * np.uint64(0x9E3779B97F4A7C15) ^ hashes[i + 1])
            column = np.int64(value & mask)
            if counts[column] == 0:
                touched[found] = column
                found += 1
            if counts[column] < _MAX_COUNT - 1:
                counts[column] += 1
    return found


@kernel
def _score(hashes, offsets, weights, intercept, bits, ngrams, levels, low, high, scores):
    counts = np.zeros(1 << bits, np.int16)
    longest = 0
    for document in range(len(offsets) - 1):
        longest = max(longest, offsets[document + 1] - offsets[document])
    touched = np.empty(ngrams * longest + 1, np.int64)
    for document in range(len(offsets) - 1):
        found = _count(
            hashes, offsets[document], offsets[document + 1], bits, ngrams, counts, touched
        )
        total, square = 0.0, 0.0
        for k in range(found):
            column = touched[k]
            level = np.float64(levels[counts[column]])
            total += level * np.float64(weights[column])
            square += level * level
            counts[column] = 0
        value = total / np.sqrt(square) + intercept if found else low
        scores[document] = min(max(value, low), high)


@kernel
def _fill(hashes, offsets, bits, ngrams, levels, columns, values, bounds):
    """Compressed sparse rows of unit length; returns the number of entries."""
    counts = np.zeros(1 << bits, np.int16)
    longest = 0
    for document in range(len(offsets) - 1):
        longest = max(longest, offsets[document + 1] - offsets[document])
    touched = np.empty(ngrams * longest + 1, np.int64)
    used = 0
    for document in range(len(offsets) - 1):
        found = _count(
            hashes, offsets[document], offsets[document + 1], bits, ngrams, counts, touched
        )
        square = 0.0
        for k in range(found):
            level = np.float64(levels[counts[touched[k]]])
            square += level * level
        for k in range(found):
            column = touched[k]
            columns[used] = column
            values[used] = levels[counts[column]] / np.sqrt(square)
            used += 1
            counts[column] = 0
        bounds[document + 1] = used
    return used
