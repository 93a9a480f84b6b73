from __future__ import annotations

import random

import pyarrow as pa
import pytest

from raylign.data.extraction.polishing import find_unclean, polish, repair
from raylign.data.extraction.text import clean_text

ALPHABET = (
    "abc \t\n\n\r\x0b\x1c\x85\u00a0\u00adéà\u0301\u0300가각\u11a8\u1161\u212b豈漢字😀\u200b\u2028"
    "ไทย\u0e33हि\U0001109a\U000110ba\U0002f800\u2003—“”Ðñ\u0344\u0387\u0958"
)


def flags(*texts: str) -> list[int]:
    return find_unclean(pa.array(texts, pa.large_string())).tolist()


def column(*texts: str) -> pa.Array:
    return pa.array(texts, pa.large_string())


def test_texts_that_are_passed_over_are_clean() -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 6))) for _ in range(30_000)]
    passed = [t for t, flag in zip(texts, flags(*texts), strict=True) if not flag & 1]
    assert len(passed) > 3000
    assert [t for t in passed if clean_text(t) != t] == []


def test_no_character_is_passed_over_that_cleaning_changes() -> None:
    texts = [f"a{chr(c)}b" for c in range(0x30000) if not 0xD800 <= c < 0xE000]
    passed = [t for t, flag in zip(texts, flags(*texts), strict=True) if not flag & 1]
    assert [t for t in passed if clean_text(t) != t] == []
    assert len(passed) > 60_000  # and few are looked at for nothing


def test_ordinary_texts_cost_nothing() -> None:
    assert flags(
        "Plain words.\n\n  indented", "Straße, «café» — l’été", "Привет, СССР» № 5", "漢字😀", ""
    ) == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp1251"])
@pytest.mark.parametrize("text", ["it’s – fine…", "Привет, как дела?", "“naïve” résumé"])
def test_garbled_encodings_are_suspected_and_repaired(text: str, encoding: str) -> None:
    try:
        garbled = text.encode().decode(encoding)
    except UnicodeDecodeError:
        pytest.skip(f"{encoding} has no character for one of these bytes")
    assert flags(garbled)[0] & 2
    assert polish(column(garbled), pa.array([True])).to_pylist() == [text]
    assert repair(text) == text


def test_only_usable_rows_change_and_slices_are_seen_as_they_are() -> None:
    texts = column("x", " a \n", " b \n", "clean", "é\u0301 ")
    usable = pa.array([True, True, False, True, True])
    assert polish(texts, usable).to_pylist() == ["x", " a", " b \n", "clean", "é\u0301"]
    assert polish(texts[1:3], usable[1:3]).to_pylist() == [" a", " b \n"]
    assert polish(texts[:0], usable[:0]).to_pylist() == []
