from __future__ import annotations

import pytest

from raylign.data.textbook.arithmetic import write_textbook
from raylign.tokenization.compare import compare
from raylign.tokenization.train import train_bpe

PAGES = list(write_textbook(200, 0, 3, 0.85))


def test_baselines_by_hand() -> None:
    tokenizer = train_bpe(PAGES, 300)
    training = ["aaa bb b", "aaa"]
    bpe, characters, words = compare(tokenizer, training, ["aaa bb", "aaa zé"])
    assert (bpe.name, characters.name, words.name) == ("bpe", "characters", "words")
    # "a", "b" and " " are known; "z" and "é" are not. 13 bytes in 12 characters.
    assert (characters.vocab_size, characters.bytes_per_token) == (
        4,
        pytest.approx(13 / 12, abs=1e-4),
    )
    assert characters.unknown_rate == pytest.approx(2 / 12, abs=1e-6)
    assert characters.round_trip == 0.5
    # Words: aaa, " ", bb | aaa, " ", zé: one of six is unknown.
    assert words.bytes_per_token == pytest.approx(13 / 6, abs=1e-4)
    assert words.unknown_rate == pytest.approx(1 / 6, abs=1e-6)
    assert words.round_trip == 0.5
    assert bpe.round_trip == 1.0 and bpe.unknown_rate == 0.0


def test_equal_vocabulary_sizes_and_frequent_pieces_first() -> None:
    tokenizer = train_bpe(PAGES, 300)
    training = [" ".join(f"w{i}" for i in range(j)) for j in range(500)]
    _, _, words = compare(tokenizer, training, ["w0 w1 w499"])
    assert words.vocab_size == 300
    assert words.unknown_rate == pytest.approx(1 / 5)


def test_bpe_beats_characters_and_words_on_unseen_pages() -> None:
    tokenizer = train_bpe(PAGES[:150], 400)
    bpe, characters, words = compare(tokenizer, PAGES[:150], PAGES[150:])
    assert bpe.bytes_per_token > 1.5 * characters.bytes_per_token
    assert bpe.round_trip == 1.0 > words.round_trip
    assert bpe.unknown_rate == 0.0 < words.unknown_rate


def test_empty_sample() -> None:
    with pytest.raises(ValueError, match="needs a sample"):
        compare(train_bpe(PAGES, 300), PAGES, ["", ""])
