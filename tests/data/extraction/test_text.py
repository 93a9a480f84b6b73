from __future__ import annotations

import random
import unicodedata

import pytest

from raylign.data.extraction.text import clean_text, is_encodable, split_passages, split_sections


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("cafe\u0301", "café"),
        ("a\r\nb\rc\u2028d\x0be", "a\nb\nc\nd\ne"),
        ("x\x00y\x07z\x9f", "xyz"),
        ("\ufeffsoft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
        ("a\u00a0b\u3000c", "a b c"),
        ("line  \t\n    indented  \n\n\n\n\nnext\n\n", "line\n    indented\n\nnext"),
        (
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        ),
        ("tab\tstays", "tab\tstays"),
        (" \n \n", ""),
        ("e\u200b\u0301", "é"),
    ],
)
def test_clean_text(raw: str, clean: str) -> None:
    assert clean_text(raw) == clean


def test_cleaning_a_clean_text_changes_nothing() -> None:
    rng = random.Random(0)
    alphabet = "ab \t\n\r\v\x00\x85\u00a0\u2000\u2028\u200b\u00ade\u0301\u0323\ufeff가ᅡ"
    for _ in range(2000):
        text = clean_text("".join(rng.choices(alphabet, k=12)))
        assert clean_text(text) == text
        assert unicodedata.is_normalized("NFC", text)


def test_is_encodable() -> None:
    assert is_encodable("ok 😀")
    assert not is_encodable("half \ud83d")


def test_split_sections_cuts_at_underlined_headings_only() -> None:
    text = "Intro\n=====\n\nsome text\n\nPart\n----\n\nmore ---\n-- no\n\n*****\nlast\n"
    sections = list(split_sections(text))
    assert [section.split("\n")[0] for _, section in sections] == ["Intro", "Part"]
    assert "".join(section for _, section in sections) == text
    assert all(text[offset:].startswith(section) for offset, section in sections)


def test_split_passages_keeps_everything_within_the_limit() -> None:
    rng = random.Random(1)
    for _ in range(300):
        lines = ["x" * rng.randint(0, 12) for _ in range(rng.randint(1, 30))]
        text = "\n".join(lines)
        passages = list(split_passages(text, 25))
        assert "".join(passage for _, passage in passages) == text
        for offset, passage in passages:
            assert text[offset : offset + len(passage)] == passage
            assert len(passage) <= 25 or passage.count("\n") <= 1 or not passage.strip("\n")
    assert [p for _, p in split_passages("aa\n\nbb\n\ncc", 8)] == ["aa\n\nbb\n\n", "cc"]
