"""Knobs of duplicate removal."""

from __future__ import annotations

from raylign.config.section import Count, Section, Share


class DedupConfig(Section):
    """Exact and near-duplicate removal (MinHash-LSH)."""

    ngram: Count = 5
    """Words in a shingle."""
    bands: Count = 14
    """LSH bands."""
    rows: Count = 8
    """Hashes in a band."""
    threshold: Share = 0.7
    """A document goes only if a kept one has at least this estimated Jaccard similarity."""
