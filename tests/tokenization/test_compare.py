from __future__ import annotations

import pytest

from raylign.data.textbook.arithmetic import write_textbook
from raylign.tokenization.compare import (
    Comparison,
    Scores,
    compare,
    cost_embedding,
    take_subject,
    time_encoding,
    trace_curve,
    train_baselines,
)
from raylign.tokenization.lexicon import train_characters, train_words
from raylign.tokenization.sample import Excerpt
from raylign.tokenization.train import train_bpe

PAGES = list(write_textbook(200, 0, 3, 0.85))


def excerpts(*texts: str, domain: str = "d", language: str | None = None) -> list[Excerpt]:
    return [Excerpt(text, domain, language) for text in texts]


def test_baselines_by_hand() -> None:
    characters, words = compare(
        train_baselines(["aaa bb b", "aaa"], 300), excerpts("aaa bb", "aaa zé")
    )
    assert (characters.name, words.name) == ("characters", "words")
    # "a", "b" and " " are known; "z" and "é" are not. 13 bytes in 12 characters.
    assert characters.vocab_size == 4
    assert characters.scores.bytes_per_token == pytest.approx(13 / 12, abs=1e-4)
    assert characters.scores.unknown_rate == pytest.approx(2 / 12, abs=1e-6)
    assert characters.scores.round_trip == 0.5
    # Words: aaa, " ", bb | aaa, " ", zé: one of six is unknown, and of the four with letters.
    assert words.scores.bytes_per_token == pytest.approx(13 / 6, abs=1e-4)
    assert words.scores.unknown_rate == pytest.approx(1 / 6, abs=1e-6)
    assert words.scores.round_trip == 0.5
    assert words.scores.single_token_share == 0.75
    assert words.vocab_size == 5  # aaa, bb, b, " ", <unk>


def test_equal_vocabulary_sizes_and_frequent_pieces_first() -> None:
    training = [" ".join(f"w{i}" for i in range(j)) for j in range(500)]
    _, words = compare(train_baselines(training, 300), excerpts("w0 w1 w499"))
    assert words.vocab_size == 300
    assert words.scores.unknown_rate == pytest.approx(1 / 5)


def test_every_number_by_hand() -> None:
    subject = take_subject("char", train_characters(["abé 1"]))
    assert subject.size == 10  # four special tokens, <unk>, and five characters
    sample = [
        *excerpts("ab é", domain="x", language="fr"),
        *excerpts("b?a", domain="y", language="en"),
        *excerpts("", domain="y"),
    ]
    [found] = compare([subject], sample)
    assert found.scores == Scores(
        documents=3,
        tokens=7,
        bytes_per_token=round(8 / 7, 4),
        characters_per_token=1.0,
        fertility=round(7 / 3, 4),  # "ab", "é", "b?a"
        unknown_rate=round(1 / 7, 6),
        round_trip=round(2 / 3, 4),
        single_token_share=0.75,  # é, b and a, but not ab
        vocabulary_use=0.5,  # a, b, blank, é, <unk>
    )
    assert list(found.domains) == ["x", "y"] and list(found.languages) == ["en", "fr"]
    assert found.domains["x"].tokens == found.languages["fr"].tokens == 4
    assert found.domains["y"].documents == 2 and found.languages["en"].documents == 1
    assert found.languages["en"].unknown_rate == pytest.approx(1 / 3, abs=1e-6)
    row = found.describe()
    assert row["name"] == "char" and row["tokens"] == 7 and row["domains"]["x"]["tokens"] == 4


def test_words_in_one_token_count_the_blank_before_and_no_parts_of_characters() -> None:
    # Words " the" and "the" become single tokens; "東" is three bytes at one place.
    bpe = take_subject("bpe", train_bpe(["the the the the"] * 4, 263))
    assert [t for t in bpe.tokenizer.get_vocab() if len(t) > 1 and "<" not in t] != []
    [found] = compare([bpe], excerpts("the the"))
    assert found.scores.single_token_share == 1.0
    [found] = compare([bpe], excerpts("東 the thee athe"))
    assert found.scores.single_token_share == 0.25


def test_markup_in_text_is_text() -> None:
    subject = take_subject("bpe", train_bpe(PAGES, 300, ("<work>",)))
    [found] = compare([subject], excerpts("<eos>"))
    assert found.scores.tokens == 5 and found.scores.round_trip == 1.0


def test_bpe_beats_characters_and_words_on_unseen_pages() -> None:
    subjects = [take_subject("bpe", train_bpe(PAGES[:150], 400))]
    subjects += train_baselines(PAGES[:150], 400)
    bpe, characters, words = (row.scores for row in compare(subjects, excerpts(*PAGES[150:])))
    assert bpe.bytes_per_token > 1.5 * characters.bytes_per_token
    assert bpe.round_trip == 1.0 > words.round_trip
    assert bpe.unknown_rate == 0.0 < words.unknown_rate


def test_scores_do_not_depend_on_how_documents_are_batched() -> None:
    subject = take_subject("bpe", train_bpe(PAGES, 300))
    [whole] = compare([subject], excerpts(*PAGES[:40]))
    parts = [compare([subject], excerpts(*PAGES[i : i + 20]))[0] for i in (0, 20)]
    assert whole.scores.tokens == sum(part.scores.tokens for part in parts)


def test_gpt2_style_unknown_token_is_not_unknown() -> None:
    tokenizer = train_bpe(PAGES, 300)
    tokenizer.unk_token = tokenizer.eos_token
    assert take_subject("bpe", tokenizer).unknown is None
    assert take_subject("word", train_words(["a b"], 8)).unknown == 4


def test_embedding_cost() -> None:
    # GPT-2 small: 50,257 x 768 of 124 million; 12 layers of 12 x 768^2 are 85 million.
    parameters, share = cost_embedding(50257, 768, 12)
    assert parameters == 38_597_376
    assert share == pytest.approx(38_597_376 / (38_597_376 + 84_934_656))


def test_curve_grows_with_the_vocabulary() -> None:
    curve = trace_curve(lambda size: train_bpe(PAGES, size), (400, 280), excerpts(*PAGES[:20]))
    assert [size for size, _ in curve] == [280, 400]
    assert curve[0][1] < curve[1][1]


def test_speed_is_a_rate() -> None:
    assert time_encoding(take_subject("bpe", train_bpe(PAGES, 300)), excerpts(*PAGES[:5])) > 0


def test_empty_sample() -> None:
    with pytest.raises(ValueError, match="needs a sample"):
        compare(train_baselines(PAGES, 300), excerpts("", ""))
    assert isinstance(compare(train_baselines(PAGES, 9), excerpts("a"))[0], Comparison)
