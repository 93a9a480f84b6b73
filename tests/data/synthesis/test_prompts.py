from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.config import UserError
from raylign.config.synthesis import StyleConfig
from raylign.data.synthesis.prompts import (
    Excerpt,
    Material,
    draw_excerpts,
    draw_prompts,
    read_lines_of,
    split_by_share,
)
from raylign.data.synthesis.styles import choose_styles

TOPICS = tuple(f"topic {n}" for n in range(7))
SEEDS = tuple(Excerpt(f"id{n}", f"excerpt {{x}} {n}") for n in range(3))
MATERIAL = Material(TOPICS, ("children", "adults"), SEEDS)
BUILT_IN = ["textbook", "exercise", "questions", "story", "python"]


def plain(name: str, instruction: str, share: float = 1.0) -> StyleConfig:
    return StyleConfig(name=name, instruction=instruction, share=share)


def draw(styles: list[StyleConfig | str], count: int, seed: int = 0) -> list[str]:
    ready = choose_styles(styles, MATERIAL.present, chat=True)
    return [prompt.text for prompt in draw_prompts(ready, MATERIAL, count, seed)]


def test_every_combination_comes_once() -> None:
    texts = draw([plain("a", "{topic}|{audience}|{seed}")], 7 * 2 * 3)
    expected = {f"{t}|{a}|{s.text}" for t in TOPICS for a in ("children", "adults") for s in SEEDS}
    assert set(texts) == expected and len(texts) == 42
    assert texts != sorted(texts)


def test_fields_a_style_does_not_use_do_not_multiply_it() -> None:
    assert sorted(draw([plain("a", "on {topic}")], 7)) == sorted(f"on {t}" for t in TOPICS)
    with pytest.raises(UserError, match=r"8 of them are of style 'a', which has 7 .*7 topics"):
        draw([plain("a", "on {topic}")], 8)


def test_draws_are_reproducible_and_shorter_ones_are_beginnings() -> None:
    styles: list[StyleConfig | str] = [plain("a", "{topic} {audience} {seed}")]
    assert draw(styles, 20) == draw(styles, 20)
    assert draw(styles, 20)[:9] == draw(styles, 9)
    assert draw(styles, 20) != draw(styles, 20, seed=1)


def test_styles_are_mixed_by_their_shares_from_the_start() -> None:
    styles = [plain("a", "a {topic} {seed}", share=3), plain("b", "b {topic}")]
    names = [text[0] for text in draw(list(styles), 16)]
    assert Counter(names) == {"a": 12, "b": 4}
    assert Counter(names[:8]) == {"a": 6, "b": 2}


def test_shares_add_up() -> None:
    assert split_by_share([1, 1, 1], 10) == [4, 3, 3]
    assert split_by_share([3, 1], 4) == [3, 1]
    assert split_by_share([0.5, 0.25], 1) == [1, 0]
    assert sum(split_by_share([0.1, 0.7, 1.3, 2], 997)) == 997


def test_a_prompt_says_what_it_was_made_from() -> None:
    styles = choose_styles([plain("a", "{{json}} {topic} {seed}")], MATERIAL.present, chat=True)
    for prompt in draw_prompts(styles, MATERIAL, 5, seed=0):
        [seed] = [s for s in SEEDS if s.doc_id == prompt.seed_document]
        # Braces in values and doubled ones in templates are plain text.
        assert prompt.text == f"{{json}} {prompt.topic} {seed.text}"
        assert prompt.audience is None and len(prompt.hash) == 32


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    "material",
    [
        MATERIAL,
        Material(TOPICS, ("adults",), ()),
        Material((), ("adults",), SEEDS),
    ],
)
def test_built_in_styles_fit_what_is_given(chat: bool, material: Material) -> None:
    for style in choose_styles(BUILT_IN, material.present, chat):
        [prompt] = draw_prompts([style], material, 1, seed=0)
        assert "<subject>" not in prompt.text and "{topic}" not in prompt.text
        assert (prompt.topic is None) == (not material.topics)
        assert (prompt.seed_document is None) == (not material.seeds)
        if prompt.topic:
            assert prompt.topic in prompt.text
        if material.seeds:
            assert "excerpt {x}" in prompt.text


@pytest.mark.parametrize(
    ("styles", "chat", "message"),
    [
        (["textboook"], True, "did you mean 'textbook'"),
        (["textbook", "textbook"], True, "'textbook' is there twice"),
        ([plain("a", "{topic")], True, "stray brace"),
        ([plain("a", "{topics}")], True, r"names \{topics\}; fields are \{topic\}"),
        ([plain("a", "{topic:>9}")], True, "fields are"),
        ([plain("a", "{topic.x}")], True, "fields are"),
        ([plain("a", "{topic}")], False, "has no 'completion'"),
        ([StyleConfig(name="a", completion="x")], True, "has no 'instruction'"),
        ([plain("a", "{seed}")], True, "synthesise.seeds has none"),
    ],
)
def test_templates_that_cannot_be_filled(
    styles: list[StyleConfig | str], chat: bool, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_styles(styles, ("topic", "audience"), chat)


def test_built_in_styles_need_something_to_write_about() -> None:
    with pytest.raises(UserError, match="something to write about"):
        choose_styles(["story"], ("audience",), chat=True)


def test_lists_come_from_the_recipe_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "topics.txt"
    file.write_text("cells\n\n  rivers \ncells\n")
    assert read_lines_of(file, "synthesise.topics") == ("cells", "rivers")
    assert read_lines_of(("b", "a", "b"), "k") == ("b", "a")
    file.write_text("\n \n")
    with pytest.raises(UserError, match="holds no lines"):
        read_lines_of(file, "synthesise.topics")
    with pytest.raises(UserError, match=r"synthesise.topics=.*cannot be read"):
        read_lines_of(tmp_path / "none", "synthesise.topics")


def write_corpus(directory: Path, rows: int, parts: int) -> Path:
    ids = [f"d{n}" for n in range(rows)]
    texts = ["\n".join(f"line {n} {k} of some length" for k in range(40)) for n in range(rows)]
    (directory / "documents").mkdir(parents=True)
    for part in range(parts):
        table = pa.table({"doc_id": ids[part::parts], "text": texts[part::parts]})
        pq.write_table(table, directory / "documents" / f"part-{part}.parquet")
    return directory


def test_excerpts_are_those_of_chosen_documents_however_they_are_stored(tmp_path: Path) -> None:
    one = draw_excerpts(write_corpus(tmp_path / "a", 30, 1), 8, 100, seed=5)
    assert one == draw_excerpts(write_corpus(tmp_path / "b", 30, 4), 8, 100, seed=5)
    assert len({e.doc_id for e in one}) == 8
    assert one != draw_excerpts(tmp_path / "a", 8, 100, seed=6)
    for found in one:
        assert found.text.startswith(f"line {found.doc_id[1:]} ")
        assert 50 < len(found.text) <= 100
    assert len({e.text.split()[2] for e in one}) > 2  # from anywhere in the documents


def test_short_documents_are_shown_whole_and_blank_ones_not_at_all(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["short", "  ", None]}), tmp_path / "x.parquet")
    [only] = draw_excerpts(tmp_path, 5, 100, seed=0)
    assert only == Excerpt("x.parquet#0", "short")
    pq.write_table(pa.table({"text": ["  "]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no documents with text"):
        draw_excerpts(tmp_path, 5, 100, seed=0)
