from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raylign.data.extraction.main_text import decode, extract, is_too_deep

ROOT = Path(__file__).resolve().parents[3]

BODY = "<p>" + "The quick brown fox jumps over the lazy dog near the river bank. " * 8 + "</p>"
PAGE = (
    "<html><head><title>Foxes</title></head><body><nav><a href=/>Home</a> <a href=/x>Shop</a></nav>"
    f"<article><h1>Of foxes</h1>{BODY}{BODY.upper()}</article><footer>Us</footer></body></html>"
)


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_the_main_text_is_found_and_the_frame_left_out(extractor: str) -> None:
    text = extract(PAGE, None, extractor)
    assert text.lower().count("quick brown fox") == 16
    assert "Shop" not in text and "<p>" not in text


def test_without_an_extractor_all_text_is_taken() -> None:
    text = extract(PAGE, None, "none")
    assert "Shop" in text and "Of foxes" in text and "<" not in text


@pytest.mark.parametrize("html", ["", " ", "<html></html>", "<script>x=1</script>", "<", "\0"])
@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura", "none"])
def test_a_page_without_text_has_none(html: str, extractor: str) -> None:
    assert extract(html, None, extractor).strip("\0\ufffd<") == ""


TEXT = "Füße, déjà vu – œuvre"
META = '<html><head><meta charset="{}"></head><body>{}</body></html>'


@pytest.mark.parametrize(
    ("data", "charset"),
    [
        (TEXT.encode(), None),
        (TEXT.encode(), "iso-8859-1"),  # what is valid UTF-8 is UTF-8, whatever a header claims
        (b"\xef\xbb\xbf" + TEXT.encode(), None),
        (b"\xff\xfe" + TEXT.encode("utf-16-le"), None),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), "utf-8"),
        (TEXT.encode("cp1252"), "windows-1252"),
        (TEXT.encode("cp1252"), "ISO-8859-1"),  # as browsers read it
        (TEXT.encode("cp1252"), "no such charset"),
        (META.format("windows-1252", TEXT).encode("cp1252"), None),
    ],
)
def test_encodings(data: bytes, charset: str | None) -> None:
    assert TEXT in decode(data, charset)


def test_charsets_of_pages_and_headers() -> None:
    russian, japanese = "Привет, как ваши дела сегодня?", "日本語のテキストです"
    assert russian in decode(META.format("koi8-r", russian).encode("koi8-r"), None)
    assert russian in decode(russian.encode("cp1251"), "windows-1251")
    assert japanese in decode(japanese.encode("shift_jis"), "Shift_JIS")
    assert japanese in decode(japanese.encode("iso2022_jp"), "iso-2022-jp")


def test_wrong_bytes_are_left_out() -> None:
    assert decode(b"good \xff\xfe bytes \x80\x81" * 3, "utf-8").count("good") == 3


def test_pages_made_to_be_deep_are_not_parsed() -> None:
    assert is_too_deep("<div>" * 5000 + "text")
    assert not is_too_deep("<br>" * 50_000 + "<p>text" * 9000)
    assert not is_too_deep("<div><b>text</b></div>" * 9000)
    assert extract("<div>" * 300_000 + "text", None, "resiliparse") == ""


def test_importing_needs_no_extractor() -> None:
    code = "import sys, raylign.data.extraction.main_text as m; print('trafilatura' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT / "platform")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "False"
