from __future__ import annotations

import itertools
import random

import pytest

from raylign.data.decontamination.index import (
    build_index,
    find_matches,
    list_needles,
    overlapping,
    remove_lines,
)
from raylign.data.textbook.arithmetic import Problem, hold_out, list_phrasings, write_textbook
from raylign.data.words import split_words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("What is 7 + 3? <work>", True),
        ("we know that 7 + 3 = 10 holds", True),
        ("7 + 3 =?", True),
        ("7 + 3 is ten", True),
        ("The SUM of 3 and 7", True),
        ("7  +\n3 =", True),
        ("WHAT IS 7 + 3", True),
        ("What is 7+3?", True),
        ("<b>7 + 3 = 10</b>", True),
        ("What is 3 + 7?", True),
        ("3 plus 7 equals", True),
        ("A shelf holds 7 books; with 3 more it holds 10.", True),
        ("What is 17 + 35?", False),
        ("What is 17 + 3?", False),
        ("What is 7 + 39?", False),
        ("What is 7 + 3.5?", False),
        ("What is 7 + 3,000?", False),
        ("What is 1.7 + 3?", False),
        ("What is 7 - 3?", False),
        ("What is 7 + 4, or 6 + 3?", False),
        ("ones: 7+3=10, carry 1", False),
        ("A shelf holds 7 books; with 30 more it holds 37.", False),
    ],
)
def test_boundaries_of_a_held_out_problem(text: str, found: bool) -> None:
    index = build_index(list_needles([Problem(7, "+", 3)]), 13)
    assert (overlapping([text], index) == [0]) is found


def test_subtraction_is_not_exchanged() -> None:
    index = build_index(list_needles([Problem(7, "-", 3)]), 13)
    texts = ["What is 7 - 3?", "What is 3 - 7?", "Subtract 3 from 7.", "subtract 7 from 3"]
    assert overlapping(texts, index) == [0, 2]


def test_equal_operands_have_one_set_of_needles() -> None:
    assert "What is 4 + 4" in list_needles([Problem(4, "+", 4)])
    assert set(list_phrasings(Problem(4, "+", 4))) <= set(list_needles([Problem(4, "+", 4)]))


def test_every_phrasing_of_every_held_out_problem_is_found() -> None:
    problems = hold_out(100, 5, 3)
    index = build_index(list_needles(problems), 13)
    texts = [f"see: {phrase}." for problem in problems for phrase in list_phrasings(problem)]
    assert overlapping(texts, index) == list(range(len(texts)))


def test_long_items_match_by_ngram_and_short_ones_whole() -> None:
    item = " ".join(f"word{i}" for i in range(20))
    index = build_index([item, "three small words"], 5)
    assert index.lengths.tolist() == [3, 5]
    assert overlapping(
        [
            "x word7 word8 word9 word10 word11 y",
            "x word7 word8 word9 word10 y",
            "those three small words",
            "three small",
            "small words three",
        ],
        index,
    ) == [0, 2]


def test_items_of_one_word_are_counted_and_ignored() -> None:
    index = build_index(["yes", "", "no way"], 13)
    assert (index.ignored, index.entries) == (2, 1)
    assert overlapping(["yes", "there is no way"], index) == [1]


def test_empty_index_finds_nothing() -> None:
    index = build_index([], 13)
    assert overlapping(["anything at all"], index) == []
    assert remove_lines(["anything"], index) == {}


def brute_force(texts: list[str], items: list[str], ngram: int) -> list[tuple[int, int, int]]:
    """Every (document, first byte, last byte), by comparing word lists."""
    needles = set()
    for own in (split_words([item]).hashes.tolist() for item in items):
        if len(own) >= 2:
            width = min(len(own), ngram)
            needles |= {tuple(own[i : i + width]) for i in range(len(own) - width + 1)}
    found = []
    for document, text in enumerate(texts):
        words = split_words([text])
        own = words.hashes.tolist()
        for i, j in itertools.combinations_with_replacement(range(len(own)), 2):
            if tuple(own[i : j + 1]) in needles:
                found.append((document, int(words.starts[i]), int(words.ends[j])))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_matches_against_brute_force(seed: int) -> None:
    rng = random.Random(seed)

    def write(least: int, most: int) -> str:
        return " ".join(rng.choice("abcd") for _ in range(rng.randint(least, most)))

    texts, items = [write(0, 40) for _ in range(30)], [write(1, 9) for _ in range(12)]
    found = find_matches(texts, build_index(items, 4))
    triples = list(
        zip(found.documents.tolist(), found.starts.tolist(), found.ends.tolist(), strict=True)
    )
    assert triples == brute_force(texts, items, 4)
    assert len(triples) > len(texts)  # more than the first guess of room


def test_remove_lines() -> None:
    index = build_index(["secret item here"], 13)
    texts = [
        "keep\na secret\nitem here now\nkeep too",
        "clean",
        "x secret item here",
        "ü\nsecret item here\nß",
    ]
    cleaned = remove_lines(texts, index)
    assert {k: (c.text, c.removed) for k, c in cleaned.items()} == {
        0: ("keep\nkeep too", ("a secret", "item here now")),
        2: ("", ("x secret item here",)),
        3: ("ü\nß", ("secret item here",)),
    }


def test_removing_lines_repeats_until_neighbours_spell_nothing() -> None:
    index = build_index(["one two three", "red green"], 13)
    cleaned = remove_lines(["one two\nred green\nthree\nrest"], index)
    assert cleaned[0].text == "rest"
    assert cleaned[0].removed == ("red green", "one two", "three")


def test_textbook_without_its_held_out_lines() -> None:
    held = hold_out(600, 0, 3)
    pages = list(write_textbook(300, 0, 3, 0.85))
    index = build_index(list_needles(held), 13)
    cleaned = remove_lines(pages, index)
    left = [cleaned[i].text if i in cleaned else page for i, page in enumerate(pages)]
    assert overlapping(left, index) == []
    lines = sum(page.count("\n") + 1 for page in pages)
    removed = sum(len(c.removed) for c in cleaned.values())
    # Short problems recur on many pages: whole pages would be too many to lose.
    assert len(cleaned) > 0.2 * len(pages)
    assert removed < 0.1 * lines
