from __future__ import annotations

import pytest

from raylign.config import QualityConfig
from raylign.data.quality.rules import KEYS, list_reasons, measure

CONFIG = QualityConfig(
    min_chars=10,
    max_chars=60,
    min_alpha_share=0.5,
    max_line_repeat_share=0.4,
    max_mean_word_chars=8,
)


def test_metrics_by_hand() -> None:
    metrics = measure("ab 1!\nab 1!\n\ncd ??")
    assert metrics.chars == 18
    assert metrics.alpha_share == pytest.approx(8 / 12)
    assert metrics.line_repeat_share == pytest.approx(1 / 3)
    assert metrics.mean_word_chars == 2.0
    empty = measure("")
    assert (empty.alpha_share, empty.line_repeat_share, empty.mean_word_chars) == (0, 0, 0)


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("a good text of words", []),
        ("short", ["too_short"]),
        ("many words " * 9, ["too_long"]),
        ("!!! ??? ... a", ["few_letters"]),
        ("same line\nsame line\nsame line", ["repeated_lines"]),
        ("extraordinarily uncharacteristic", ["long_words"]),
        ("!!!!!!!!!\n!!!!!!!!!", ["few_letters", "repeated_lines", "long_words"]),
        ("???", ["too_short", "few_letters"]),
    ],
)
def test_every_reason_is_given(text: str, reasons: list[str]) -> None:
    assert list_reasons(measure(text), CONFIG) == reasons


def test_thresholds_themselves_pass() -> None:
    assert list_reasons(measure("abcde fghi"), CONFIG) == []
    assert (
        list_reasons(measure("ab!! cd!!x"), CONFIG.model_copy(update={"min_alpha_share": 5 / 9}))
        == []
    )


def test_every_reason_names_a_key() -> None:
    worst = QualityConfig(
        min_chars=10,
        max_chars=1,
        min_alpha_share=1.0,
        max_line_repeat_share=0.0,
        max_mean_word_chars=0.5,
    )
    assert list_reasons(measure("!\n!"), worst) == list(KEYS)
    assert set(KEYS.values()) <= set(QualityConfig.model_fields)
