from __future__ import annotations

import pickle
import random

import numpy as np
import pyarrow as pa
import pytest

from raylign.config import DecontaminateConfig
from raylign.data.decontamination.index import (
    HELD_OUT,
    Index,
    Item,
    build_index,
    count_documents,
    drop_common,
    overlapping,
)
from raylign.data.decontamination.removal import (
    EXCERPT_BYTES,
    decontaminate,
)
from raylign.data.words import split_words

LINE = DecontaminateConfig(ngram=5)
WHOLE = DecontaminateConfig(ngram=5, granularity="document")


def name_words(letter: str, count: int) -> list[str]:
    return [f"{letter}{number}" for number in range(count)]


def test_hit_names_everything() -> None:
    item = Item("quiz", "test.jsonl#3", " ".join(name_words("w", 10)))
    index = build_index([item], 5)
    text = "Before, W1 w2\nw3: w4 w5 w6! after x y z"
    verdict = decontaminate([text], index, WHOLE)[0]
    assert verdict.text is None
    (hit,) = verdict.hits
    assert (hit.task, hit.item) == ("quiz", "test.jsonl#3")
    assert hit.excerpt == "W1 w2\nw3: w4 w5 w6"
    assert hit.item_coverage == pytest.approx(6 / 10)
    assert hit.document_coverage == pytest.approx(6 / 11)


def test_excerpt_is_the_longest_passage_and_cut_between_characters() -> None:
    words = [f"wört{number}ü" for number in range(60)]
    index = build_index([Item("quiz", "1", " ".join(words))], 5)
    text = " ".join([*words[:5], "other", *words[9:60]])
    (hit,) = decontaminate([text], index, WHOLE)[0].hits
    assert hit.excerpt.startswith("wört9ü wört10ü")
    assert len(hit.excerpt.encode()) in (EXCERPT_BYTES, EXCERPT_BYTES - 1)
    assert hit.item_coverage == pytest.approx(56 / 60)
    assert hit.document_coverage == pytest.approx(56 / 57)


def test_repetitions_count_once_for_the_item_and_each_time_for_the_document() -> None:
    index = build_index([Item("quiz", "1", "a b c d e f g h i j")], 5)
    (hit,) = decontaminate(["a b c d e x a b c d e f"], index, WHOLE)[0].hits
    assert hit.item_coverage == pytest.approx(6 / 10)
    assert hit.document_coverage == pytest.approx(11 / 12)
    index = build_index([Item("quiz", "1", "a a a a a a a")], 5)  # one 5-gram, three places
    (hit,) = decontaminate(["a a a a a"], index, WHOLE)[0].hits
    assert hit.item_coverage == 1.0


def test_an_item_of_several_texts_counts_once_by_its_best() -> None:
    items = [Item("quiz", "1", "a b c d e f g h i j"), Item("quiz", "1", "k l m n o")]
    index = build_index(items, 5)
    (hit,) = decontaminate(["a b c d e f y k l m n o"], index, WHOLE)[0].hits
    assert (hit.item_coverage, hit.document_coverage) == (1.0, pytest.approx(11 / 12))
    assert hit.excerpt == "a b c d e f"


def test_wording_that_items_share_is_credited_to_those_covered_most() -> None:
    template = "which of these two things is right"
    items = [Item("quiz", str(n), f"{template} the w{n} x{n} y{n} z{n}") for n in range(9)]
    items += [Item("other", "1", f"{template} no one two three four five six")]
    index = build_index(items, 5)
    texts = [
        items[3].text,
        f"{items[3].text} and {items[5].text}",
        f"{template} only",
        f"{template} the w2 x2 y9 z9",
    ]
    found = {
        at: [(hit.task, hit.item) for hit in verdict.hits]
        for at, verdict in decontaminate(texts, index, WHOLE).items()
    }
    other = ("other", "1")  # of another task: on its own
    assert found == {
        0: [("quiz", "3"), other],
        1: [("quiz", "3"), ("quiz", "5"), other],
        2: [("quiz", str(n)) for n in range(9)] + [other],
        3: [("quiz", "2"), other],
    }


@pytest.mark.parametrize(
    ("least", "affected"), [(0.0, [0, 1, 2]), (0.5, [1, 2]), (0.6, [1, 2]), (0.61, [2]), (1.0, [2])]
)
def test_coverage_thresholds(least: float, affected: list[int]) -> None:
    item = Item("quiz", "1", "a b c d e f g h i j", min_coverage=least)
    texts = [
        "x a b c d x e f x",  # 0.4
        "a b c x h i j",  # 0.6
        "a b c d e f g h i j",
        "a b x c d x e f x",
    ]
    index = build_index([item], 3)
    assert list(decontaminate(texts, index, WHOLE)) == affected
    assert overlapping(texts, index) == affected


def test_own_items_need_one_ngram_whatever_the_sets_need() -> None:
    items = [Item("quiz", "1", "a b c d e f g h", min_coverage=0.9), "a b c x y z u v"]
    (hit,) = decontaminate(["a b c"], build_index(items, 3), WHOLE)[0].hits
    assert (hit.task, hit.item) == (HELD_OUT, "1")


def test_lines_go_until_coverage_is_below_the_threshold() -> None:
    item = Item("quiz", "1", "a b c d e f g h i j", min_coverage=0.5)
    index = build_index([item], 3)
    text = "keep this line here\na b c\nd e f\nand that line as well"
    verdict = decontaminate([text], index, LINE)[0]
    assert verdict.text == "keep this line here\nand that line as well"
    assert verdict.removed == ("a b c", "d e f")
    few = "keep this line here\na b c\nand that line as well"
    assert decontaminate([few], index, LINE) == {}


def test_short_items_are_counted_and_listed() -> None:
    items = [
        Item("quiz", "1", "yes no", min_words=3),
        Item("quiz", "2", "yes no", min_words=2),
        Item("quiz", "3", "yes", min_words=1),
        Item("quiz", "4", "no way", min_words=3),
        Item("quiz", "4", "no way at all", min_words=3),
    ]
    index = build_index(items, 5)
    assert index.ignored == 3
    assert index.unused == (("quiz", "1"), ("quiz", "3"))
    (hit,) = decontaminate(["well, yes, no, yes"], index, WHOLE)[0].hits
    assert hit.item == "2"


def test_half_of_the_text_decides() -> None:
    index = build_index(["one two three"], 5)
    kept = "one two three\n" + "k" * 14  # 28 characters, 14 left
    gone = "one two three\n" + "k" * 13
    short = "ü" * 14 + "\none two three"  # characters count, not bytes
    verdicts = decontaminate([kept, gone, short, "clean"], index, LINE)
    assert {at: verdict.text for at, verdict in verdicts.items()} == {
        0: "k" * 14,
        1: None,
        2: "ü" * 14,
    }
    assert verdicts[0].removed == ("one two three",)
    assert verdicts[1].removed == ()
    assert decontaminate([kept], index, WHOLE)[0].text is None


def test_window_takes_neighbouring_lines() -> None:
    index = build_index(["one two three"], 5)
    text = "aaaaaaaaaaaaaaaaaaaaaaaaa\nbbb\none two three\nccc\nddddddddddddddddddddddddd"
    for window, left in ((0, 4), (1, 4), (2, 2), (5, 2), (6, 0)):
        config = LINE.model_copy(update={"window": window})
        verdict = decontaminate([text], index, config)[0]
        if left:
            assert verdict.text is not None
            assert len(verdict.text.split("\n")) == left
        else:
            assert verdict.text is None


def test_kinds_of_input() -> None:
    index = build_index(["one two three"], 5)
    texts = ["clean", "one two three ü", "", "x\none two three"]
    expected = decontaminate(texts, index, LINE)
    assert list(expected) == [1, 3]
    array = pa.array(["skipped", *texts], pa.string()).slice(1)
    chunks = pa.chunked_array([pa.array(texts[:2]), pa.array(texts[2:])])
    for given in (tuple(texts), array, array.cast(pa.large_string()), chunks):
        assert decontaminate(given, index, LINE) == expected
        assert overlapping(given, index) == [1, 3]
    holes = pa.array([None, texts[1], None])
    assert list(decontaminate(holes, index, LINE)) == [1]
    assert decontaminate([], index, LINE) == {}
    assert decontaminate(pa.array([], pa.large_string()), index, LINE) == {}
    assert decontaminate(texts, build_index([], 5), LINE) == {}
    assert overlapping([], index) == []


def write(rng: random.Random, least: int, most: int) -> list[str]:
    return [rng.choice("abc") for _ in range(rng.randint(least, most))]


def list_grams(words: list[str], width: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + width]) for i in range(len(words) - width + 1)]


def cover(words: list[str], grams: set[tuple[str, ...]]) -> set[int]:
    """The words that lie in any of `grams`."""
    return {
        i + step
        for width in {len(gram) for gram in grams}
        for i, gram in enumerate(list_grams(words, width))
        if gram in grams
        for step in range(width)
    }


def judge_by_hand(
    document: list[str], items: list[list[str]], ngram: int, least: float
) -> list[tuple[str, float, float]]:
    """(item, its coverage, the document's) for each item that `document` is said to hold."""
    coverage, shared = {}, {}
    for number, item in enumerate(items):
        width = min(len(item), ngram)
        both = set(list_grams(item, width)) & set(list_grams(document, width))
        share = len(cover(item, both)) / len(item)
        if both and share >= least:
            coverage[number], shared[number] = share, both
    credited = set()
    for gram in set().union(*shared.values()):
        rivals = [number for number, grams in shared.items() if gram in grams]
        best = max(coverage[number] for number in rivals)
        credited |= {number for number in rivals if coverage[number] == best}
    all_covered = len(cover(document, set().union(*shared.values()))) / max(1, len(document))
    return [(str(number), coverage[number], all_covered) for number in sorted(credited)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("least", [0.0, 0.5, 0.9])
def test_coverage_against_brute_force(seed: int, least: float) -> None:
    rng = random.Random(seed)
    documents = [write(rng, 0, 30) for _ in range(25)]
    items = [write(rng, 2, 14) for _ in range(10)]
    index = build_index(
        [Item("quiz", str(n), " ".join(item), 2, least) for n, item in enumerate(items)], 4
    )
    verdicts = decontaminate([" ".join(document) for document in documents], index, WHOLE)
    expected = {
        position: hits
        for position, document in enumerate(documents)
        if (hits := judge_by_hand(document, items, 4, least))
    }
    assert {
        position: [(hit.item, hit.item_coverage, hit.document_coverage) for hit in verdict.hits]
        for position, verdict in verdicts.items()
    } == {
        position: [(item, pytest.approx(own), pytest.approx(its)) for item, own, its in hits]
        for position, hits in expected.items()
    }
    assert len(expected) > 0


@pytest.mark.parametrize("size", [1, 7])
def test_batches_do_not_matter(size: int) -> None:
    rng = random.Random(1)
    texts = ["\n".join(" ".join(write(rng, 0, 6)) for _ in range(8)) for _ in range(30)]
    items = [Item("quiz", str(n), " ".join(write(rng, 5, 9))) for n in range(8)]
    index = build_index(items, 5)
    whole = decontaminate(texts, index, LINE)
    parts = {}
    for start in range(0, len(texts), size):
        for at, verdict in decontaminate(texts[start : start + size], index, LINE).items():
            parts[start + at] = verdict
    assert parts == whole
    assert len(whole) > 5
    left = [verdict.text for verdict in whole.values() if verdict.text is not None]
    assert overlapping(left, index) == []


@pytest.mark.parametrize("rows", [1, 40])
def test_pages_of_many_items_are_weighed_in_parts(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(2)
    texts = [" ".join(write(rng, 0, 40)) for _ in range(40)]
    items = [Item("quiz", str(n), " ".join(write(rng, 3, 9)), 2, 0.6) for n in range(12)]
    index = build_index(items, 4)
    whole = decontaminate(texts, index, WHOLE)
    monkeypatch.setattr("raylign.data.decontamination.index._ROWS_AT_ONCE", rows)
    assert decontaminate(texts, index, WHOLE) == whole
    assert len(whole) > 5


def test_index_travels() -> None:
    index = build_index([Item("quiz", "1", "one two three")], 5)
    again: Index = pickle.loads(pickle.dumps(index))
    text = ["so one two three it is"]
    assert decontaminate(text, again, LINE) == decontaminate(text, index, LINE) != {}


def test_common_ngrams_are_ignored_unless_held_out() -> None:
    items = [
        Item("quiz", "1", "all rights are reserved by law and u v w x y z"),
        Item("quiz", "2", "who is it"),
        "who is it",
        "all rights are reserved by the way",
    ]
    index = build_index(items, 5)
    boiler = ["all rights are reserved by law", "x all rights are reserved by me", "who is it"]
    texts = [*boiler, "now u v w x y z end"]
    # The parts of a corpus are counted apart, and a document counts once.
    counts = count_documents([*texts[:2], f"{boiler[0]}. {boiler[0]}."], index)
    counts = counts + count_documents(texts[2:], index)
    assert sorted(counts.tolist(), reverse=True)[:4] == [3, 2, 1, 1]
    rarer = drop_common(index, counts, 1)
    assert rarer.entries == index.entries - 1  # "rights are reserved by law"; the other is held out
    found = decontaminate(texts, rarer, WHOLE)
    assert {
        at: [(hit.task, hit.item) for hit in verdict.hits] for at, verdict in found.items()
    } == {
        0: [(HELD_OUT, "3")],
        1: [(HELD_OUT, "3")],
        2: [("quiz", "2"), (HELD_OUT, "2")],
        3: [("quiz", "1")],
    }
    assert decontaminate(texts, drop_common(index, counts, 3), WHOLE) == decontaminate(
        texts, index, WHOLE
    )


@pytest.mark.parametrize("ngram", [5, 8, 13])
def test_planted_items_are_found_at_every_alignment(ngram: int) -> None:
    rng = random.Random(ngram)
    vocabulary = name_words("w", 5000)
    filler = [rng.choice(vocabulary) for _ in range(600)]
    secret = name_words("s", 20)
    index = build_index([Item("quiz", "1", " ".join(secret))], ngram)
    texts, expected = [], []
    for place in range(0, 600, 7):
        start = rng.randint(0, 20 - ngram)
        piece = secret[start : start + ngram]
        texts.append(" ".join([*filler[:place], *piece, *filler[place:]]))
        texts.append(" ".join([*filler[:place], *piece[:-1], *filler[place:]]))
        expected.append(len(texts) - 2)
    verdicts = decontaminate(texts, index, WHOLE)
    assert list(verdicts) == expected
    size = len(split_words(texts[:1]).hashes)
    for verdict in verdicts.values():
        (hit,) = verdict.hits
        assert len(hit.excerpt.split()) == ngram
        assert hit.item_coverage == ngram / 20
        assert hit.document_coverage == ngram / size


def test_foreign_ngrams_rarely_pass_the_filters() -> None:
    rng = np.random.default_rng(0)

    def draw(count: int) -> str:
        return " ".join(map(str, rng.integers(0, 1 << 40, count)))

    index = build_index([Item("quiz", "1", draw(100_000))], 13)
    bits = sum(int(block).bit_count() for block in index.blocks)
    assert 0 < bits / (64 * len(index.blocks)) < 0.25  # so at most 1/64 pass on the average
    assert overlapping([draw(100_000)], index) == []
