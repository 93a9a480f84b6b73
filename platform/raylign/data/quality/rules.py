"""Heuristic filters: every metric of a document, and every reason to reject it.

The rules are the ones that paid in MassiveText (Rae et al. 2021, "Gopher", table A1), reduced to
those that hold for any language written with spaces.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from raylign.config import QualityConfig

KEYS = {
    "too_short": "min_chars",
    "too_long": "max_chars",
    "few_letters": "min_alpha_share",
    "repeated_lines": "max_line_repeat_share",
    "long_words": "max_mean_word_chars",
}
"""Every reason, and the key of `QualityConfig` that sets its threshold."""

_ALPHANUMERIC = re.compile(r"[^\W_]")


@dataclass(frozen=True, slots=True)
class Metrics:
    """What the filters look at."""

    chars: int
    alpha_share: float
    """Letters and digits among non-space characters; 0 for an empty text."""
    line_repeat_share: float
    """Non-empty lines that repeat an earlier one, among all non-empty lines."""
    mean_word_chars: float
    """Mean length of the words between white space."""


def measure(text: str) -> Metrics:
    """All metrics of one document."""
    words = text.split()
    inked = sum(map(len, words))
    letters = inked if text.isalnum() else len(_ALPHANUMERIC.findall(text))
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    return Metrics(
        chars=len(text),
        alpha_share=letters / inked if inked else 0.0,
        line_repeat_share=1 - len(set(lines)) / len(lines) if lines else 0.0,
        mean_word_chars=inked / len(words) if words else 0.0,
    )


def list_reasons(metrics: Metrics, config: QualityConfig) -> list[str]:
    """Every reason to reject the document, in a fixed order; empty for a good one."""
    checks = (
        ("too_short", metrics.chars < config.min_chars),
        ("too_long", metrics.chars > config.max_chars),
        ("few_letters", metrics.alpha_share < config.min_alpha_share),
        ("repeated_lines", metrics.line_repeat_share > config.max_line_repeat_share),
        ("long_words", metrics.mean_word_chars > config.max_mean_word_chars),
    )
    return [reason for reason, failed in checks if failed]
