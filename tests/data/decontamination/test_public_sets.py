"""The public evaluation sets, planted into web pages."""

from __future__ import annotations

import json
from collections import Counter
from itertools import cycle
from pathlib import Path

import pytest

from raylign.config import DecontaminateConfig
from raylign.config.decontamination import EvaluationSetConfig
from raylign.data.decontamination.evaluation_sets import load_items
from raylign.data.decontamination.index import Index, Item, build_index
from raylign.data.decontamination.removal import decontaminate
from raylign.data.words import split_words

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
SETS = {
    "gsm8k": ("gsm8k/test.jsonl", 1319),
    "humaneval": ("humaneval/HumanEval.jsonl.gz", 164),
    "mbpp": ("mbpp/mbpp.jsonl", 974),
    "mmlu": ("mmlu/test", 14042),
    "truthfulqa": ("truthfulqa/TruthfulQA.csv", 817),
}
PAGES = "web/c4_demo.jsonl"

needs_data = pytest.mark.skipif(
    not all((DATA / path).exists() for path in [PAGES, *(path for path, _ in SETS.values())]),
    reason=f"{DATA} does not hold the public evaluation sets",
)


def configure(ngram: int = 13, **keys: str) -> DecontaminateConfig:
    against = tuple(
        EvaluationSetConfig(task=task, path=DATA / path) for task, (path, _) in SETS.items()
    )
    return DecontaminateConfig.model_validate(
        {"against": against, "ngram": ngram, "granularity": "document", **keys}
    )


@pytest.fixture(scope="module")
def loaded() -> tuple[list[Item], Index]:
    items = load_items(configure())
    return items, build_index(items, 13)


def read_pages() -> list[str]:
    with (DATA / PAGES).open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


@needs_data
def test_every_item_is_found_wherever_it_stands(loaded: tuple[list[Item], Index]) -> None:
    items, index = loaded
    sizes = split_words([item.text for item in items]).offsets
    planted = [
        item
        for item, first, stop in zip(items, sizes[:-1], sizes[1:], strict=True)
        if stop - first >= item.min_words
    ]
    pages = cycle(page[:900].split(" ") for page in read_pages())
    texts = []
    for number, (item, page) in enumerate(zip(planted, pages, strict=False)):
        place = number % (len(page) + 1)
        # White space and ASCII case differ between copies on the web.
        body = " ".join(item.text.split()).replace("T", "t") if number % 2 else item.text
        texts.append("\n".join([" ".join(page[:place]), body, " ".join(page[place:])]))
    verdicts = decontaminate(texts, index, configure())
    missed = [
        (item.task, item.item)
        for number, item in enumerate(planted)
        if (item.task, item.item, 1.0)
        not in {(hit.task, hit.item, hit.item_coverage) for hit in verdicts[number].hits}
    ]
    assert missed == []
    items_of = {(hit.task, hit.item) for verdict in verdicts.values() for hit in verdict.hits}
    found, unused = (Counter(task for task, _ in names) for names in (items_of, index.unused))
    assert Counter(task for task, _ in index.names) == {t: n for t, (_, n) in SETS.items()}
    assert {task: found[task] + unused[task] for task in SETS} == {
        t: n for t, (_, n) in SETS.items()
    }
    assert unused["gsm8k"] == unused["humaneval"] == 0


@needs_data
def test_web_pages_hold_none(loaded: tuple[list[Item], Index]) -> None:
    pages = read_pages()
    assert len(pages) == 300
    assert decontaminate(pages, loaded[1], configure()) == {}


@needs_data
def test_gsm8k_questions_that_its_own_training_set_repeats(
    loaded: tuple[list[Item], Index],
) -> None:
    with (DATA / "gsm8k/train.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["question"] for line in lines]
    verdicts = decontaminate(texts, loaded[1], configure())
    hits = [hit for verdict in verdicts.values() for hit in verdict.hits]
    # Looked at: the same question with other numbers, twice, and two that share a sentence.
    assert len(verdicts) == 4
    assert {hit.item for hit in hits} == {f"test.jsonl#{row}" for row in (581, 602, 632)}
    assert max(hit.item_coverage for hit in hits) == pytest.approx(0.757, abs=0.01)
    # Coverage of half of the words with shorter n-grams keeps what shares a sentence only.
    config = configure(8, method="coverage")
    items = [item for item in load_items(config) if item.task == "gsm8k"]
    covered = decontaminate(texts, build_index(items, 8), config)
    assert {hit.item for verdict in covered.values() for hit in verdict.hits} == {
        "test.jsonl#602",
        "test.jsonl#632",
    }
