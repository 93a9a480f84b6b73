"""Who goes and for whom, against brute force; the tasks run in this process, and on Ray."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from raylign.config import DedupConfig
from raylign.data.corpus.duplicates import EXACT, SETTLED, Duplicates, find_duplicates
from raylign.data.corpus.parts import run_parts
from raylign.data.dedup.index import Index, format_id, make_facts, write_part
from raylign.data.dedup.signatures import estimate_jaccard, sign
from raylign.data.textbook.arithmetic import write_textbook
from raylign.data.words import split_words
from raylign.tracking import ProgressBoard

CONFIG = DedupConfig(keep="first")
BOARD = ProgressBoard(Console(file=io.StringIO()))


def run_here(
    name: str, rows: Sequence[Any], work: Any, directory: Path, *_: Any, **__: Any
) -> list[dict[str, Any]]:
    """`run_parts` without Ray."""
    return [dict(work(row, directory)) for row in rows]


def index(texts: list[str], directory: Path, config: DedupConfig, parts: int = 1) -> list[str]:
    """Index parts of the texts, in order."""
    stems = []
    for number, rows in enumerate(np.array_split(np.arange(len(texts)), parts)):
        mine = [texts[row] for row in rows]
        signed = sign(mine, config)
        ids = [f"{row:032x}" for row in rows]
        chars = np.array([len(text) for text in mine])
        facts = make_facts(ids, signed, chars, np.zeros(len(mine), np.int32))
        stem = directory / f"part-{number:06d}"
        write_part(stem, signed, facts)
        stems.append(str(stem))
    return stems


def deduplicate(
    texts: list[str],
    directory: Path,
    config: DedupConfig = CONFIG,
    priority: Sequence[int] | None = None,
    parts: int = 1,
    settled: int = 0,
    run: Any = run_here,
) -> Duplicates:
    directory.mkdir(exist_ok=True)
    rank = np.array(priority if priority is not None else [0] * len(texts), np.int64)
    rank[:settled] = SETTLED
    stems = index(texts, directory, config, parts)
    alive = np.ones(len(texts), bool)
    return find_duplicates(stems, alive, rank, settled, config, directory, BOARD, run)


def shingles(texts: list[str], ngram: int) -> list[set[tuple[int, ...]]]:
    """n-grams of every text, written out."""
    words = split_words(texts)
    result = []
    for document in range(len(texts)):
        own = words.of(document).tolist()
        width = min(ngram, len(own))
        result.append(
            {tuple(own[i : i + width]) for i in range(len(own) - width + 1)} if own else set()
        )
    return result


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0


def plant(seed: int, originals: int = 120) -> list[str]:
    """Texts of random words, with copies of which a few words are replaced."""
    rng = random.Random(seed)
    texts = []
    for _ in range(originals):
        words = [f"w{rng.randint(0, 4000)}" for _ in range(rng.randint(60, 200))]
        texts.append(words)
        for _ in range(rng.randint(0, 2)):
            copy = list(words)
            for _ in range(rng.choice([0, 1, 1, 2, 4, 8, 16])):
                copy[rng.randrange(len(copy))] = f"w{rng.randint(0, 4000)}"
            texts.append(copy)
    rng.shuffle(texts)
    return [" ".join(words) for words in texts]


def test_signatures_estimate_jaccard() -> None:
    texts = plant(0)
    sets = shingles(texts, CONFIG.ngram)
    sketches = sign(texts, CONFIG).sketches
    errors = []
    for a, b in itertools.combinations(range(len(texts)), 2):
        exact = jaccard(sets[a], sets[b])
        if exact > 0.05:
            agreed = (sketches[a] == sketches[b]).sum()
            errors.append(estimate_jaccard(agreed, sketches.shape[1]) - exact)
    # The standard deviation of a binomial share of 112 draws is at most 0.047.
    assert len(errors) > 50
    assert abs(np.mean(errors)) < 0.012
    assert np.sqrt(np.mean(np.square(errors))) < 0.055


@pytest.mark.parametrize("seed", range(4))
def test_recall_and_precision_against_brute_force(seed: int, tmp_path: Path) -> None:
    texts = plant(seed)
    sets = shingles(texts, CONFIG.ngram)
    found = deduplicate(texts, tmp_path)
    kept = np.flatnonzero(found.kept)
    alike = [
        (a, b)
        for a, b in itertools.combinations(range(len(texts)), 2)
        if jaccard(sets[a], sets[b]) >= 0.85
    ]
    missed = [pair for pair in alike if all(found.kept[list(pair)])]
    assert len(alike) > 30
    assert len(missed) <= 0.02 * len(alike)
    for document in np.flatnonzero(~found.kept):
        keeper = found.keeper[document]
        assert found.kept[keeper]
        assert found.similarity[document] >= CONFIG.threshold - 1e-6
        assert jaccard(sets[document], sets[keeper]) >= CONFIG.threshold - 0.15
    assert (found.keeper[kept] == kept).all()


def test_exact_copies_differ_in_case_and_white_space_only(tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog near the river bank today"
    found = deduplicate(
        [text, text.upper(), text.replace(" ", "\n  "), text + " again", "other"], tmp_path
    )
    assert (found.kind == EXACT).tolist() == [False, True, True, False, False]
    assert found.keeper[[1, 2]].tolist() == [found.keeper[0]] * 2
    assert found.kept[4]


def test_chain_does_not_remove_what_resembles_no_kept_document(tmp_path: Path) -> None:
    """A ~ B ~ C, but A and C are far apart: components would keep one of them only."""
    words = [f"w{i}" for i in range(300)]
    a, b, c = words[:200], words[25:225], words[50:250]
    config = DedupConfig(threshold=0.7, bands=56, rows=2)
    found = deduplicate([" ".join(t) for t in (a, b, c)], tmp_path, config)
    sets = shingles([" ".join(t) for t in (a, b, c)], 5)
    assert jaccard(sets[0], sets[1]) > 0.72 and jaccard(sets[0], sets[2]) < 0.65
    for document in np.flatnonzero(~found.kept):
        assert jaccard(sets[document], sets[found.keeper[document]]) > 0.6


def test_documents_without_words_are_not_alike(tmp_path: Path) -> None:
    found = deduplicate(["... !!!", "???", "", "one two"], tmp_path)
    assert found.kept.all()


def test_short_documents_are_one_shingle(tmp_path: Path) -> None:
    found = deduplicate(["alpha beta", "Alpha, beta!", "alpha gamma"], tmp_path)
    assert found.keeper.tolist() == [0, 0, 2]


def test_textbook_pages_are_not_duplicates_of_each_other(tmp_path: Path) -> None:
    """They share lessons and templates and differ in their numbers."""
    pages = list(write_textbook(1500, 3, 3, 0.85))
    assert (~deduplicate(pages, tmp_path).kept).sum() == 0
    twice = [*pages, pages[7], pages[9].replace("\n", " \n\n")]
    assert np.flatnonzero(~deduplicate(twice, tmp_path).kept).tolist() == [1500, 1501]


def test_the_rule_says_who_stays(tmp_path: Path) -> None:
    rng = random.Random(5)
    words = [f"w{rng.randrange(4000)}" for _ in range(200)]
    versions = [" ".join([*words, *(f"end{i}x{j}" for j in range(4))]) for i in range(4)]
    texts = ["something else entirely", *versions]
    for best in range(1, 5):
        priority = [0] * 5
        priority[best] = 9
        found = deduplicate(texts, tmp_path / str(best), priority=priority)
        assert np.flatnonzero(found.kept).tolist() == [0, best]
        assert set(found.keeper[1:].tolist()) == {best}
    first = deduplicate(texts, tmp_path / "first")
    assert np.flatnonzero(first.kept).tolist() == [0, 1]


def test_a_copy_of_a_document_that_goes_is_given_the_one_that_stays(tmp_path: Path) -> None:
    base = [f"w{i}" for i in range(200)]
    near = " ".join([*base[:-20], *(f"x{i}" for i in range(20))])
    found = deduplicate([near, near.upper(), " ".join(base)], tmp_path, priority=[0, 0, 5])
    assert found.keeper.tolist() == [2, 2, 2]
    assert not (found.kind == EXACT).any()
    assert found.similarity[0] == found.similarity[1] >= CONFIG.threshold


def test_earlier_documents_stay_and_later_ones_go_for_them(tmp_path: Path) -> None:
    rng = random.Random(6)
    old = [" ".join(f"w{rng.randrange(4000)}" for _ in range(120)) for _ in range(30)]
    twin = old[3].replace(old[3].split()[60], "changed", 1)
    new = [old[5].upper(), twin, "nothing of the kind was ever read before today"]
    # Two earlier documents that resemble each other are not compared again.
    old.append(old[7].replace(old[7].split()[60], "changed", 1))
    found = deduplicate([*old, *new], tmp_path, settled=len(old), priority=[99] * 34, parts=3)
    assert found.kept.tolist() == [True] * 31 + [False, False, True]
    assert found.keeper[31:33].tolist() == [5, 3]
    assert (found.kind == EXACT).tolist()[31:] == [True, False, False]


def test_documents_that_are_not_alive_keep_nobody_out(tmp_path: Path) -> None:
    texts = ["one two three four five six seven eight nine"] * 3
    stems = index(texts, tmp_path, CONFIG)
    alive = np.array([False, True, True])
    zeros = np.zeros(3, np.int64)
    found = find_duplicates(stems, alive, zeros, 0, CONFIG, tmp_path, BOARD, run_here)
    assert found.kept.tolist() == [False, True, False]
    assert found.keeper[2] == 1


def test_no_difference_how_the_work_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = plant(9, 80) * 2
    whole = deduplicate(texts, tmp_path / "whole")
    monkeypatch.setattr("raylign.data.corpus.ranges.KEYS_A_TASK", 50)
    monkeypatch.setattr("raylign.data.corpus.duplicates.KEYS_TOGETHER", 1)
    monkeypatch.setattr("raylign.data.corpus.duplicates.DOCUMENTS_A_COMPARISON", 37)
    pieces = deduplicate(texts, tmp_path / "pieces", parts=7)
    for name in ("keeper", "similarity", "kind"):
        assert np.array_equal(getattr(whole, name), getattr(pieces, name))
    assert (whole.candidates, whole.verified) == (pieces.candidates, pieces.verified)
    assert len(list((tmp_path / "pieces").glob("pairs-*.npy"))) > 14


def test_ray_finds_the_same(ray_cluster: None, tmp_path: Path) -> None:
    texts = plant(11, 80)
    here = deduplicate(texts, tmp_path / "here", parts=3)
    there = deduplicate(texts, tmp_path / "there", parts=3, run=run_parts)
    assert np.array_equal(here.keeper, there.keeper)
    assert (~here.kept).sum() > 10


def test_ids_come_back(tmp_path: Path) -> None:
    stems = index([f"text number {n} of many" for n in range(20)], tmp_path, CONFIG, parts=4)
    ids = Index(stems).gather(np.array([0, 3, 7, 19]), "id")
    assert [format_id(value) for value in ids] == [f"{n:032x}" for n in (0, 3, 7, 19)]
