"""Excerpts of two texts and the words that differ."""

from __future__ import annotations

import numpy as np

from raylign.data.report.differences import EXCERPT_CHARS, Excerpt, compare


def marked(excerpt: Excerpt) -> list[str]:
    return [excerpt.text[start:end] for start, end in excerpt.changed]


def unmarked(excerpt: Excerpt) -> str:
    text, at, pieces = excerpt.text, 0, []
    for start, end in (*excerpt.changed, (len(text), len(text))):
        pieces.append(text[at:start])
        at = end
    return "".join(pieces)


def test_words_that_the_other_lacks_are_marked() -> None:
    left, right = compare("a cat sat on the mat", "a dog sat on the wet mat")
    assert marked(left) == ["cat"]
    assert marked(right) == ["dog", "wet "]
    assert left.skipped == right.skipped == 0


def test_a_long_common_beginning_is_skipped() -> None:
    same = "word " * 2000
    left, right = compare(f"{same}one end", f"{same}two end")
    assert left.skipped == right.skipped > 9000
    assert marked(left) == ["one"] and marked(right) == ["two"]
    assert left.text.startswith("word ")


def test_equal_texts_begin_at_the_beginning() -> None:
    left, right = compare("same " * 999, "same " * 999)
    assert left == right
    assert left.skipped == 0 and not left.changed and len(left.text) == EXCERPT_CHARS


def test_one_is_the_beginning_of_the_other() -> None:
    left, right = compare("same " * 100, "same " * 100 + "and more")
    assert not left.changed
    assert "".join(marked(right)).endswith("and more")


def test_nothing_to_compare_with() -> None:
    left, right = compare("some text", "")
    assert marked(left) == ["some text"] and right.text == ""


def test_what_is_not_marked_is_the_same() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        texts = [" ".join(rng.choice(list("abcd"), rng.integers(1, 40))) for _ in range(2)]
        left, right = compare(*texts)
        assert unmarked(left) == unmarked(right)
        assert all(piece for piece in (*marked(left), *marked(right)))


def test_text_without_blanks_is_no_burden() -> None:
    left, right = compare("x" * 100_000, "x" * 50_000 + "y" * 50_000)
    assert len(left.text) == len(right.text) == EXCERPT_CHARS
    assert right.changed and left.skipped == right.skipped
