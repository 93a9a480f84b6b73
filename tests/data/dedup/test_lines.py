"""Lines and paragraphs, by hand and against plain Python."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest

from raylign.config import LinesConfig
from raylign.data.dedup.lines import find_repeated, split_lines


def cut_out(text: str, spans: np.ndarray) -> list[str]:
    raw = text.encode()
    return [raw[start:stop].decode() for start, stop in spans.tolist()]


def test_lines_and_paragraphs_with_their_places() -> None:
    text = "Grüße an alle!\n\nZwei\nZeilen hier\n\n\nEnde ohne Zeilenende"
    lines = split_lines([text, ""], LinesConfig(min_chars=5))
    assert cut_out(text, lines.spans) == [
        "Grüße an alle!\n",
        "Zeilen hier\n",
        "Ende ohne Zeilenende",
    ]
    paragraphs = split_lines([text], LinesConfig(unit="paragraph", min_chars=5))
    assert cut_out(text, paragraphs.spans) == [
        "Grüße an alle!\n\n",
        "Zwei\nZeilen hier\n\n\n",
        "Ende ohne Zeilenende",
    ]


def test_pieces_join_to_the_text_when_none_is_too_short() -> None:
    rng = random.Random(1)
    text = "".join(rng.choice("ab \n\n") for _ in range(400)).strip("\n")
    for unit in ("line", "paragraph"):
        found = split_lines([text], LinesConfig(unit=unit, min_chars=1))
        for piece in cut_out(text, found.spans):
            assert piece.strip()
        kept = sum(len(p.replace("\n", "").replace(" ", "")) for p in cut_out(text, found.spans))
        assert kept == len(text.replace("\n", "").replace(" ", ""))


def test_case_blanks_and_numbers_do_not_matter() -> None:
    texts = ["Page 12 of 30, all rights reserved", "page 17  of 41, ALL rights reserved\n"]
    found = split_lines(texts, LinesConfig(min_chars=5))
    assert found.hashes[0] == found.hashes[1]
    other = split_lines(["page 1 of 41, all rights reserved"], LinesConfig(min_chars=5))
    assert other.hashes[0] != found.hashes[0]


@pytest.mark.parametrize("least", [2, 3])
def test_all_but_the_preferred_document_lose_a_repeated_line(least: int) -> None:
    rng = np.random.default_rng(least)
    hashes = rng.integers(0, 12, 80).astype(np.uint64)
    documents = rng.integers(0, 15, 80)
    rank = rng.permutation(15)
    priority = rank[documents] // 3  # with ties
    holders: dict[int, set[int]] = defaultdict(set)
    for value, document in zip(hashes.tolist(), documents.tolist(), strict=True):
        holders[value].add(document)
    expected = []
    for position, (value, document) in enumerate(
        zip(hashes.tolist(), documents.tolist(), strict=True)
    ):
        first = min(holders[value], key=lambda d: (-(rank[d] // 3), d))
        if len(holders[value]) >= least and document != first:
            expected.append(position)
    assert find_repeated(hashes, documents, priority, least).tolist() == expected
    assert expected


def test_nothing_to_compare() -> None:
    empty = np.empty(0, np.int64)
    assert not len(find_repeated(np.empty(0, np.uint64), empty, empty, 2))
