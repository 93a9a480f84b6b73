"""The page nests, stands alone, links to what is there, and trusts no text."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from raylign.data.report import build_report
from raylign.data.report.blocks import Card, Cards, render, visible
from raylign.data.report.plots import Histogram, Mark, draw_histogram

CHAPTERS = [
    *("funnel", "composition", "rules", "duplicates", "evaluation", "cuts", "tokens"),
    *("examples", "rejected", "stages", "settings"),
]


class Page(HTMLParser):
    """Tags, attributes and text; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, name: str) -> list[str]:
        return [value for own, value in self.attributes if own == name]


@pytest.fixture(scope="module")
def html(data_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("page")
    build_report(data_run, output)
    return (output / "data.html").read_text(encoding="utf-8")


def test_every_chapter_is_there_in_order(html: str) -> None:
    page = Page(html)
    assert [name for name in page.all("id") if name in CHAPTERS] == CHAPTERS
    text = " ".join(page.words)
    for said in (
        "40 of 49 documents stay",
        "6 of 1,319 items occurred, in 9 documents",
        "min_chars 90",
        "threshold 0.7",
        "held by max_epochs",
        "E-mail addresses, replaced",
        "at offset 10",
        "with the personal data that they may hold",
    ):
        assert said in text
    assert "signatures." in text  # named as missing


def test_links_lead_to_what_is_there_once(html: str) -> None:
    page = Page(html)
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    links = page.all("href")
    assert len(links) > len(CHAPTERS)
    assert {link for link in links if link[1:] not in ids or link[0] != "#"} == set()
    assert "#duplicates" in links  # duplicates are shown in pairs, not as examples


def test_the_page_stands_alone_and_runs_nothing(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert not re.search(r"://|@import|url\((?!#)", html)
    assert "prefers-color-scheme: dark" in html and "@media print" in html
    assert "".join(page.words).count("<script>alert(1)</script>") > 10


def test_no_character_changes_the_page_unseen(html: str) -> None:
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", html)


def test_the_same_run_gives_the_same_bytes(data_run: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        build_report(data_run, tmp_path / name)
    for file in ("data.html", "data.json"):
        first, second = (tmp_path / name / file for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("stages", [[], ["signals"], ["corpus"], ["tokenizer", "shards"]])
def test_whatever_is_there_is_shown(data_run: Path, tmp_path: Path, stages: list[str]) -> None:
    for stage in ["documents", *stages]:
        shutil.copytree(data_run / stage, tmp_path / "run" / stage)
    build_report(tmp_path / "run", tmp_path / "out")
    page = Page((tmp_path / "out" / "data.html").read_text(encoding="utf-8"))
    shown = set(page.all("id")) & set(CHAPTERS)
    assert {"rejected", "stages", "settings"} <= shown
    assert ("rules" in shown) == ("signals" in stages)
    assert ("funnel" in shown) == ("corpus" in stages)
    assert ("tokens" in shown) == ("shards" in stages)
    assert "left out above" in " ".join(page.words)


def test_visible() -> None:
    assert visible("plain text\n\twith lines") == "plain text\n\twith lines"
    assert visible("a\x00b\u202ec") == "a\ufffdb\ufffdc"
    assert visible("e" + "\u0301" * 50) == "e" + "\u0301" * 3
    assert visible("\u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947") == (
        "\u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947"
    )


def test_changed_words_are_marked_and_what_is_left_out_is_said() -> None:
    card = Card("a", "b", "one <two> three", changed=((4, 9),), skipped=1200, more=7)
    html = render(Cards("", "title", "", (card,)))
    assert "one <mark>&lt;two&gt;</mark> three" in html
    assert "1,200 characters before this" in html and "7 more characters" in html


def test_bars_and_thresholds_stand_where_their_values_are() -> None:
    edges = (0.0, 1.0, 2.0, 3.0)
    svg = draw_histogram(
        Histogram("t", edges, (4, 0, 2), (1, 0, 2), "m", (Mark(1.5, "at most 1.5"),))
    )
    bars = re.findall(r'<rect style="fill:var\(--(\w+)\)" x="([\d.]+)"', svg)
    assert bars == [("rl", "12"), ("bad", "12"), ("rl", "236")]
    assert re.findall(r'class="guide" x1="([\d.]+)"', svg) == ["180"]  # the middle of the axis
    assert "0 to 1: 4 documents (66.7%), 1 kept" in svg
