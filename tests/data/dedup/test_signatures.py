"""Signatures: exact hashes, and numbers that never change. How well sketches estimate similarity
is tried in `corpus/test_duplicates.py`, with the search that uses them."""

from __future__ import annotations

import numpy as np

from raylign.config import DedupConfig
from raylign.data.dedup.signatures import estimate_jaccard, hash_texts, needed_agreement, sign

CONFIG = DedupConfig()


def test_hashes_ignore_case_and_white_space_only() -> None:
    text = "The quick brown fox\njumps over the lazy dog, near Grüße 12"
    loud = "THE Quick BROWN fox JUMPS over THE LAZY dog, NEAR Grüße 12"
    same = [text, loud, f"  {text} \n\n", text.replace(" ", " \n\t ")]
    assert len(np.unique(hash_texts(same), axis=0)) == 1
    other = [text, text + ".", text.replace(" ", ""), text[:-1], "", "a", "ab", "b a", "a b"]
    other += ["x" * n for n in range(1, 20)] + [f"{'x' * n} y" for n in range(1, 20)]
    hashes = hash_texts(other)
    assert len(np.unique(hashes[:, 0])) == len(np.unique(hashes[:, 1])) == len(other)


def test_needed_agreement() -> None:
    for threshold in (0.0, 0.5, 0.7, 1.0):
        config = DedupConfig(threshold=threshold)
        needed = needed_agreement(config)
        agreed = np.arange(113)
        assert (
            (estimate_jaccard(agreed, 112) >= threshold - 1e-6) == (agreed >= needed)
        ).all() or (threshold == 0.0)


def test_signatures_never_change() -> None:
    """Stored indexes are compared with later documents: these numbers are part of the format."""
    signatures = sign(["The quick brown fox jumps over the lazy dog"], CONFIG)
    assert signatures.bands[0, :2].tolist() == PINNED_BANDS
    assert signatures.sketches[0, :6].tolist() == PINNED_SKETCH


PINNED_BANDS = [15264874053118545017, 5407450465466875703]
PINNED_SKETCH = [53, 115, 121, 30, 29, 221]
