"""Signatures: estimates, exact hashes, and numbers that never change."""

from __future__ import annotations

import itertools
import random

import numpy as np

from raylign.config import DedupConfig
from raylign.data.dedup.signatures import estimate_jaccard, hash_texts, needed_agreement, sign
from raylign.data.words import split_words

CONFIG = DedupConfig()


def shingles(texts: list[str], ngram: int) -> list[set[tuple[int, ...]]]:
    """n-grams of every text, written out."""
    words = split_words(texts)
    result = []
    for document in range(len(texts)):
        own = words.of(document).tolist()
        width = min(ngram, len(own))
        result.append(
            {tuple(own[i : i + width]) for i in range(len(own) - width + 1)} if own else set()
        )
    return result


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0


def plant(seed: int, originals: int = 120) -> list[str]:
    """Texts of random words, with copies of which a few words are replaced."""
    rng = random.Random(seed)
    texts = []
    for _ in range(originals):
        words = [f"w{rng.randint(0, 4000)}" for _ in range(rng.randint(60, 200))]
        texts.append(words)
        for _ in range(rng.randint(0, 2)):
            copy = list(words)
            for _ in range(rng.choice([0, 1, 1, 2, 4, 8, 16])):
                copy[rng.randrange(len(copy))] = f"w{rng.randint(0, 4000)}"
            texts.append(copy)
    rng.shuffle(texts)
    return [" ".join(words) for words in texts]


def test_signatures_estimate_jaccard() -> None:
    texts = plant(0)
    sets = shingles(texts, CONFIG.ngram)
    sketches = sign(texts, CONFIG).sketches
    errors = []
    for a, b in itertools.combinations(range(len(texts)), 2):
        exact = jaccard(sets[a], sets[b])
        if exact > 0.05:
            agreed = (sketches[a] == sketches[b]).sum()
            errors.append(estimate_jaccard(agreed, sketches.shape[1]) - exact)
    # The standard deviation of a binomial share of 112 draws is at most 0.047.
    assert len(errors) > 50
    assert abs(np.mean(errors)) < 0.012
    assert np.sqrt(np.mean(np.square(errors))) < 0.055


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
