"""The language of many documents: py3langid's model, read by a kernel.

py3langid (Barbaresi; after langid.py, Lui and Baldwin 2012) scores a text by naive Bayes on byte
n-grams that an automaton finds. Its loop runs in Python; here the same model is walked over the
Arrow buffers, and only texts that need another form first (upper case, not composed) pass through
Python.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from raylign.data.words import kernel, text_buffers

HEAD_BYTES = 1000
"""Bytes of every document that are looked at; a character that they would split is left out."""


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """The automaton (S states, R distinct rows) and the classifier (F features, C classes)."""

    moves: np.ndarray
    """uint32 [R * 256]: the next state by row and byte."""
    rows: np.ndarray
    """int32 [S]: where the row of a state starts in `moves`."""
    features: np.ndarray
    """int32 [S]: the feature that a state completes, or -1."""
    weights: np.ndarray
    """int16 [F, C], in units of `unit`: half the memory traffic, exact but for weights near 0"""
    unit: np.float32
    bias: np.ndarray
    """float32 [C]"""
    owners: np.ndarray
    """int64 [C]: the class with the same label that comes first (two scripts of one language)."""
    labels: np.ndarray
    """str [C]"""


@lru_cache(maxsize=1)
def load_model() -> Model:
    """The model inside the package, about 75 MB in memory; loaded once a process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    given = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    labels = list(given.nb_classes)
    largest = float(np.abs(given.nb_ptc).max())
    unit = 2.0 ** np.ceil(np.log2(largest / np.iinfo(np.int16).max))
    return Model(
        moves=np.array(given.tk_nextmove, np.uint32),
        rows=np.array(given.tk_row, np.int32) << 8,
        features=np.array(given.tk_output, np.int32),
        weights=np.rint(given.nb_ptc / np.float32(unit)).astype(np.int16),
        unit=np.float32(unit),
        bias=np.array(given.nb_pc, np.float32),
        owners=np.array([labels.index(label) for label in labels]),
        labels=np.array(labels),
    )


def identify(
    texts: pa.Array | pa.ChunkedArray | list[str], head_bytes: int = HEAD_BYTES
) -> tuple[np.ndarray, np.ndarray]:
    """The language of N texts (str [N], ISO 639-1 where it has a code, else 639-3), and its
    probability (float32 [N]).

    The model's own calibration is used: scores over the square root of the bytes, then softmax.
    Texts without any feature, such as empty ones, are "und" with probability 0.
    """
    model = load_model()
    data, offsets = text_buffers(texts)
    starts, stops = offsets[:-1], offsets[1:].copy()
    plain = np.zeros(len(starts), np.bool_)
    _cut_heads(data, starts, stops, head_bytes, plain)
    best, confidence = _identify(model, data, starts, stops)
    odd = np.flatnonzero(~plain)
    changed = [(row, _normalise(data[starts[row] : stops[row]].tobytes())) for row in odd]
    changed = [(row, form) for row, form in changed if form is not None]
    if changed:
        body, bounds = text_buffers([form for _, form in changed])
        again = np.array([row for row, _ in changed])
        best[again], confidence[again] = _identify(model, body, bounds[:-1], bounds[1:])
    languages = np.where(best < 0, "und", model.labels[best])
    return languages, confidence


def _normalise(text: bytes) -> str | None:
    """The form that the model was trained on; None when the text has it already."""
    given = text.decode()
    form = unicodedata.normalize("NFC", given.lower() if given.isupper() else given)
    return None if form == given else form


def _identify(
    model: Model, data: np.ndarray, starts: np.ndarray, stops: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    best = np.empty(len(starts), np.int64)
    confidence = np.empty(len(starts), np.float32)
    machine = (model.moves, model.rows, model.features)
    classifier = (model.weights, model.unit, model.bias, model.owners)
    _score(data, starts, stops, *machine, *classifier, best, confidence)
    return best, confidence


@kernel
def _cut_heads(data, starts, stops, most, plain):
    """Move `stops` to the head's end, and mark texts that are ASCII with a small letter."""
    for row in range(len(starts)):
        start, stop = starts[row], stops[row]
        if stop - start > most:
            stop = start + most
            while stop > start and data[stop] & 0xC0 == 0x80:
                stop -= 1
        small, ascii_only = False, True
        for i in range(start, stop):
            small |= 97 <= data[i] <= 122
            ascii_only &= data[i] < 128
        stops[row] = stop
        plain[row] = ascii_only and (small or stop == start)


@kernel
def _score(
    data, starts, stops, moves, rows, features, weights, unit, bias, owners, best, confidence
):
    counts = np.zeros(len(weights), np.int32)
    touched = np.empty(len(weights), np.int32)
    scores = np.empty(len(bias), np.float32)
    for row in range(len(starts)):
        state, found = np.uint32(0), 0
        for i in range(starts[row], stops[row]):
            state = moves[rows[state] + data[i]]
            feature = features[state]
            if feature >= 0:
                if counts[feature] == 0:
                    touched[found] = feature
                    found += 1
                counts[feature] += 1
        best[row], confidence[row] = -1, 0.0
        if not found:
            continue
        for c in range(len(bias)):
            scores[c] = bias[c]
        for k in range(found):
            feature = touched[k]
            scale = np.float32(np.log1p(np.float32(counts[feature]))) * unit
            counts[feature] = 0
            for c in range(len(bias)):
                scores[c] += scale * weights[feature, c]
        _decide(scores, owners, stops[row] - starts[row], row, best, confidence)


@kernel
def _decide(scores, owners, length, row, best, confidence):
    most = scores[0]
    for c in range(len(scores)):
        most = max(most, scores[c])
    scale = np.float32(1.0 / np.sqrt(length))
    total = np.float32(0.0)
    for c in range(len(scores)):
        scores[c] = np.exp((scores[c] - most) * scale)
        total += scores[c]
    for c in range(len(scores)):
        if owners[c] != c:
            scores[owners[c]] += scores[c]
            scores[c] = 0.0
    for c in range(len(scores)):
        share = scores[c] / total
        if share > confidence[row]:
            best[row], confidence[row] = c, share
