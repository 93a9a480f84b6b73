"""The page: tokens as they are shown, and nothing that it would load or run."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from raylign.data.textbook.arithmetic import write_textbook
from raylign.tokenization.chart import Line, draw_compression
from raylign.tokenization.compare import compare, take_subject
from raylign.tokenization.lexicon import train_characters, train_words
from raylign.tokenization.page import Findings, render
from raylign.tokenization.pieces import Piece, cut
from raylign.tokenization.sample import Excerpt
from raylign.tokenization.train import train_bpe
from raylign.tokenization.unigram import train_unigram

PAGES = list(write_textbook(100, 0, 3, 0.85))
SUBJECTS = [
    take_subject("bpe", train_bpe(PAGES, 400)),
    take_subject("unigram", train_unigram(PAGES, 400)),
    take_subject("word <b>", train_words(PAGES, 60)),
    take_subject("char", train_characters(PAGES)),
]
TEXT = 'What is 1 + 2?\n\t<script>alert("é")</script> \x00 東京 https://example.org <eos>'


def test_pieces_by_hand() -> None:
    bpe = take_subject("bpe", train_bpe(["ab"] * 9, 261))
    number = bpe.tokenizer.token_to_id
    assert cut(bpe, "ab é") == [
        Piece("text", "ab", number("ab")),
        Piece("text", " ", number("Ġ")),
        Piece("bytes", "C3", number("Ã")),
        Piece("bytes", "A9", number("©")),
    ]
    words = take_subject("word", train_words(["ab cd"], 8))
    assert [(p.kind, p.text) for p in cut(words, "ab xy")] == [
        ("text", "ab"), ("text", " "), ("unknown", "xy"),
    ]  # fmt: skip
    fallback = take_subject("char", train_characters(["a <0x41>"], byte_fallback=True))
    kinds = [(p.kind, p.text) for p in cut(fallback, "<0x41>é")]
    assert kinds == [("text", c) for c in "<0x41>"] + [("bytes", "C3"), ("bytes", "A9")]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_pieces_spell_the_text(subject: object) -> None:
    pieces = cut(subject, TEXT)  # type: ignore[arg-type]
    data = b"".join(bytes.fromhex(p.text) if p.kind == "bytes" else p.text.encode() for p in pieces)
    assert data.decode() == TEXT


class Reader(HTMLParser):
    """Collects tags, and complains of what is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    sample = [Excerpt(text, f"d{i % 2}", ("en", "<i>")[i % 2]) for i, text in enumerate(PAGES[:9])]
    pieces = {subject.name: cut(subject, TEXT) for subject in SUBJECTS}
    curves = {"bpe": [(300, 1.5), (400, 2.0)]}
    return render(Findings(compare(SUBJECTS, sample), curves, TEXT, pieces, 256, 4))


def test_the_page_is_one_file(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "img", "iframe", "object"}
    assert "://" not in page and "url(" not in page and "@import" not in page
    assert not [a for _, attributes in reader.tags for a in attributes if a.startswith("on")]
    assert "<i>" not in re.sub(r"<i [^>]*>", "", page), "labels are text"
    assert "word &lt;b&gt;" in page


def test_what_the_page_shows(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    classes = [attributes.get("class") or "" for _, attributes in reader.tags]
    assert sum(name == "spelling" for name in classes) == len(SUBJECTS)
    shown = sum(name.split()[:1] == ["t"] for name in classes) - 2  # the legend has two
    assert shown == sum(len(cut(subject, TEXT)) for subject in SUBJECTS)
    assert any("byte" in name for name in classes) and any("unk" in name for name in classes)
    assert "By domain" in page and "By language" in page and page.count("<svg") == 1
    assert "U+" not in page and "␀" in page


def test_chart_places_sizes_by_their_logarithm() -> None:
    curve = ((256, 1.0), (1024, 2.0), (4096, 3.0))
    drawn = draw_compression([Line("a", "rl", 4096, 3.0, curve), Line("b", "sft", 512, 2.0)])
    [points] = re.findall(r'points="([^"]*)"', drawn)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in points.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x0 < x1
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y2 < y0
    assert "b, 512 entries: 2.00 bytes a token" in drawn
    assert draw_compression([]) == ""
    assert "stroke-dasharray" not in drawn
    assert "stroke-dasharray" in draw_compression([Line("a", "rl", 9, 1.0, curve, lossy=True)])
