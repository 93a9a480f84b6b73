"""The page holds every section, loads nothing, trusts no text, and tolerates missing stages."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from raylign.evaluation.report import build_report
from raylign.run import Run, write_json
from raylign.tracking import JsonTracker

SECTIONS = [
    "journey", "data", "tokenizer", "learning", "samples", "alignment", "timeline", "rollouts",
    "evaluation", "lineage", "settings", "reproduce",
]  # fmt: skip
HOSTILE = (
    """http://evil.org/ <script>alert(1)</script><img src=x onerror="go()">'"&</style></title>"""
)


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not nest."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)
        self.ids.extend(value or "" for name, value in attrs if name == "id")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def build(root: Path, output: Path) -> tuple[dict, str, str]:
    numbers = build_report(root, output, {"processor": "a test", "cores": "2"})
    html = (output / "report.html").read_text()
    return numbers, html, (output / "report.md").read_text()


def test_every_section_is_there_in_order(fabricated_run: Path, tmp_path: Path) -> None:
    numbers, html, markdown = build(fabricated_run, tmp_path)
    assert numbers["sections"] == SECTIONS
    page = Page(html)
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert re.findall(r"^## (.*)$", markdown, re.M)[0] == "The journey"
    assert len(re.findall(r"^## ", markdown, re.M)) == len(SECTIONS)
    assert numbers["missing"] == []
    assert page.tags.count("svg") == 2 + 13 + 1  # losses, curves of RL, timeline


def test_the_headline_is_the_evaluations(fabricated_run: Path, tmp_path: Path) -> None:
    numbers, html, markdown = build(fabricated_run, tmp_path)
    assert numbers["title"] == "From raw text to 95.3% correct in 8 min 50 s"
    assert [round(s["value"], 3) for s in numbers["scores"]] == [0.042, 0.638, 0.953]
    for shown in ("+59.6 points", "+31.5 points", "6.8 GB", "3 min 35 s"):
        assert shown in html
    assert "| RL | 95.3% | ± 0.9 | +31.5 |" in markdown
    assert "answers 196 correctly that SFT got wrong, and gets 7 wrong" in html
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(numbers))


def test_the_page_stands_alone(fabricated_run: Path, tmp_path: Path) -> None:
    _, html, _ = build(fabricated_run, tmp_path)
    assert len(html) < 5_000_000
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert all(value.startswith("#") for name, value in page.attributes if name == "href" and value)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert "prefers-color-scheme: dark" in html


def test_the_same_run_gives_the_same_bytes(fabricated_run: Path, tmp_path: Path) -> None:
    first = build(fabricated_run, tmp_path / "first")
    assert build(fabricated_run, tmp_path / "second") == first


def test_the_funnel_says_what_is_protected(fabricated_run: Path, tmp_path: Path) -> None:
    _, html, markdown = build(fabricated_run, tmp_path)
    said = (
        "Protection of the test: 600 problems of this run, 162 English documents and 1,319 items "
        "of gsm8k are held out for evaluation. 1,422 lines that contained one were cut from 1,180 "
        "documents; 63 documents that contained one were removed; a second look finds that none of "
        "them is left in the training text."
    )
    assert said in html and said in markdown


@pytest.mark.parametrize(
    "kept",
    [[], ["corpus"], ["tokenizer", "shards"], ["pretrain"], ["sft"], ["align"], ["evaluate"]],
    ids=lambda kept: "+".join(kept) or "none",
)
def test_missing_stages_are_left_out_and_named(
    fabricated_run: Path, tmp_path: Path, kept: list[str]
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    for stage in kept:
        shutil.copytree(fabricated_run / stage, root / stage)
    numbers, html, markdown = build(root, tmp_path / "report")
    Page(html)
    assert set(numbers["missing"]).isdisjoint(kept) and len(numbers["missing"]) == 7 - len(kept)
    assert "left out above" in html and "left out above" in markdown


def test_a_stage_without_its_files_is_no_error(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    for stage in ("corpus", "tokenizer", "shards", "pretrain", "sft", "align", "evaluate"):
        with run.write(stage, {}, {}):
            pass
    numbers, html, _ = build(run.root, tmp_path / "report")
    Page(html)
    assert numbers["missing"] == []


def test_no_text_of_the_run_becomes_markup(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.write("corpus", {HOSTILE: HOSTILE}, {HOSTILE: "0" * 64}) as draft:
        write_json(
            draft.path / "funnel.json",
            {
                "steps": [{"name": HOSTILE, "in": 2, "out": 1, "dropped": {HOSTILE: 1}}],
                "sources": {HOSTILE: {"documents": 1, "chars": 10}},
                "examples": {HOSTILE: [{"source": HOSTILE, "text": HOSTILE}]},
            },
        )
    with run.write("sft", {}, {}) as draft:
        tracker = JsonTracker(draft.path)
        tracker.log(1, {"loss": 1.0})
        tracker.close()
        (draft.path / "samples.jsonl").write_text(
            json.dumps({"step": 1, "prompt": HOSTILE, "text": HOSTILE})
        )
    with run.write("align", {}, {}) as draft:
        tracker = JsonTracker(draft.path)
        tracker.log(0, {"reward/total": 1.0, f"dropped/{HOSTILE}": 2.0})
        tracker.event(actor=HOSTILE, what=HOSTILE, start=0.0, end=1.0, step=0)
        tracker.close()
        row = {"text": HOSTILE, "reward": 1.0, "parts": {HOSTILE: 1.0}, "version": HOSTILE}
        (draft.path / "examples.jsonl").write_text(
            json.dumps({"step": 0, "prompt": HOSTILE, "reference": HOSTILE, "completions": [row]})
        )
    with run.write("evaluate", {}, {}) as draft:
        score = {"value": 0.5, "stderr": 0.1, "n": 4}
        answers = {
            HOSTILE: [{"question": "q", "answer": HOSTILE, "reference": HOSTILE, "correct": False}],
            "b": [{"question": "q", "answer": HOSTILE, "reference": HOSTILE, "correct": True}],
        }
        write_json(
            draft.path / "results.json",
            {
                "models": [HOSTILE, "b"],
                "tasks": {HOSTILE: {"metric": {"exact": {HOSTILE: score, "b": score}}}},
                "answers": answers,
            },
        )
    write_json(run.root / "journey.json", {"command": HOSTILE, "seconds": 1.0})
    build_report(run.root, tmp_path / "report", {HOSTILE: HOSTILE})
    html = (tmp_path / "report" / "report.html").read_text()
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("style") == page.tags.count("head") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert not re.search(r"https?://", html)
    assert sum(HOSTILE in words for words in page.words) >= 15
    markdown = (tmp_path / "report" / "report.md").read_text()
    outside = re.sub(r"^```+text\n.*?\n```+$", "", markdown, flags=re.M | re.S)
    assert "<script>" not in outside
