"""Unigram, word and character tokenizers as every later stage sees them: saved and loaded."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from raylign.config import TokenizerConfig, UserError
from raylign.config.tokenizer import VocabularyConfig
from raylign.data.textbook.arithmetic import write_textbook
from raylign.models.loading import load_tokenizer, require_chat_template
from raylign.tokenization.lexicon import train_characters, train_words
from raylign.tokenization.special import BYTES, SPECIAL, UNKNOWN
from raylign.tokenization.train import train
from raylign.tokenization.unigram import _expect, _find_edges, _gather, learn_pieces, train_unigram

TAGS = TokenizerConfig().tags
TEXTS = list(write_textbook(150, 0, 3, 0.85)) + ["The language of the library is plain."] * 3
SHAKESPEARE = (
    Path(__file__).resolve().parents[3] / "shared" / "data" / "corpus" / "tinyshakespeare.txt"
)
HARD = [
    "naïve 東京 😀\u200d \x00 \t\r\n  trailing  ",
    " ▁ leading ▁▁",
    "<0x41> <0x4> <eos> <unk> <pad><user> <|x|>",
    "<work>a</work> <answer>b</answer>",
    "".join(map(chr, range(0x20, 0x250))),
    "x" * 5000 + " " * 3000 + "é" * 100,
    "",
]


def reload(tokenizer: PreTrainedTokenizerFast, directory: Path) -> Tokenizer:
    """As shards read it: from the file, markup is text."""
    tokenizer.save_pretrained(directory)
    loaded = Tokenizer.from_file(str(directory / "tokenizer.json"))
    loaded.encode_special_tokens = True
    return loaded


@pytest.mark.parametrize("kind", ["unigram", "char", "bpe"])
def test_round_trip(kind: str, tmp_path: Path) -> None:
    fallback = None if kind == "bpe" else True
    vocabulary = VocabularyConfig.model_validate({"kind": kind, "byte_fallback": fallback})
    tokenizer = train(TEXTS, vocabulary, None if kind == "char" else 450, TAGS)
    loaded = reload(tokenizer, tmp_path)
    rng = random.Random(0)
    alphabet = [chr(c) for c in (*range(1, 0xD800), *range(0xE000, 0x11000))]
    texts = HARD + TEXTS[:5] + ["".join(rng.choices(alphabet, k=30)) for _ in range(50)]
    special = set(tokenizer.all_special_ids)
    for text in texts:
        ids = loaded.encode(text, add_special_tokens=False).ids
        assert loaded.decode(ids, skip_special_tokens=True) == text
        assert not special & set(ids), f"{text[:20]!r} spells a special token"


@pytest.mark.parametrize("kind", ["unigram", "word", "char"])
def test_a_stage_of_every_kind(kind: str, tmp_path: Path) -> None:
    vocabulary = VocabularyConfig.model_validate({"kind": kind})
    size = None if kind == "char" else 420 if kind == "unigram" else 60
    tokenizer = train(TEXTS, vocabulary, size, TAGS)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    require_chat_template(loaded, tmp_path)
    assert size is None or len(loaded) == size
    assert sorted(loaded.get_vocab().values()) == list(range(len(loaded)))
    assert loaded.convert_tokens_to_ids([*SPECIAL, UNKNOWN]) == [0, 1, 2, 3, 4]
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 4)
    assert all(len(loaded(tag, add_special_tokens=False)["input_ids"]) == 1 for tag in TAGS)
    rendered = loaded.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert rendered["input_ids"][0] == 2 and rendered["input_ids"][-1] == 1
    assert rendered["assistant_masks"][-1] == 1 and rendered["assistant_masks"][0] == 0


def test_characters_are_exactly_those_of_the_text() -> None:
    tokenizer = train_characters(["ba<work>", "é b"], tags=("<work>",))
    known = tokenizer.get_vocab()
    assert set(known) == {*SPECIAL, UNKNOWN, "<work>", " ", "a", "b", "é"}
    assert [known[c] for c in (" ", "a", "b", "é")] == [5, 6, 7, 8]
    ids = tokenizer("ab?", add_special_tokens=False)["input_ids"]
    assert ids == [6, 7, 4]
    # With a size: the most frequent ones, here b and (before its equals) the blank.
    small = train_characters(["ba", "é b"], 7)
    assert set(small.get_vocab()) == {*SPECIAL, UNKNOWN, "b", " "}
    rare = train_characters(["ba", "é b"], min_frequency=2)
    assert set(rare.get_vocab()) == {*SPECIAL, UNKNOWN, "b"}
    wide = train_characters(["ba"], byte_fallback=True)
    assert set(wide.get_vocab()) == {*SPECIAL, UNKNOWN, "a", "b", *BYTES}
    assert len(wide("é", add_special_tokens=False)["input_ids"]) == 2


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="no shared/data/corpus/tinyshakespeare.txt")
def test_shakespeare_has_65_characters() -> None:
    text = SHAKESPEARE.read_text(encoding="utf-8")
    tokenizer = train_characters([text])
    entries = sorted(set(tokenizer.get_vocab()) - {*SPECIAL, UNKNOWN})
    assert entries == sorted(set(text)) and len(entries) == 65
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text) == 1_115_394
    assert tokenizer.decode(ids[:5000]) == text[:5000]


def test_words_and_what_is_unknown() -> None:
    tokenizer = train_words(["go on, go", "go  on"], 9)
    # "go" three times, "on" and a blank twice; of what occurs once, two blanks precede the comma.
    assert set(tokenizer.get_vocab()) == {*SPECIAL, UNKNOWN, "go", " ", "on", "  "}
    ids = tokenizer("go on, up", add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["go", " ", "on", UNKNOWN, " ", UNKNOWN]
    assert tokenizer.decode(tokenizer("on go  go")["input_ids"]) == "on go  go"


def test_numbers_by_digits_or_whole() -> None:
    single = train_words(["12 12 3"], 9)
    grouped = train_words(["12 12 3"], 8, single_digits=False)
    assert "12" in grouped.get_vocab() and "12" not in single.get_vocab()
    texts = ["year 1999, 1999 and 1999"] * 9
    for digits, whole in ((True, False), (False, True)):
        found = train_unigram(texts, 280, single_digits=digits)
        assert (" 1999" in found.get_vocab()) is whole


def test_unigram_expectations_against_all_segmentations() -> None:
    words, pieces = ["abab", "b"], ["a", "b", "ab", "ba", "aba"]
    scores = np.log(np.array([0.1, 0.3, 0.2, 0.15, 0.25]))
    counts = np.array([3.0, 2.0])
    lengths = np.array([len(word) for word in words], np.int64)
    found = _expect(*_find_edges(words, pieces), lengths, counts, scores)
    expected = np.zeros(len(pieces))
    for word, count in zip(words, counts, strict=True):
        spellings = []
        for cuts in range(len(word)):
            for inner in combinations(range(1, len(word)), cuts):
                bounds = [0, *inner, len(word)]
                parts = [word[a:b] for a, b in pairwise(bounds)]
                if all(part in pieces for part in parts):
                    chosen = [pieces.index(part) for part in parts]
                    spellings.append((chosen, math.exp(sum(scores[chosen]))))
        total = sum(weight for _, weight in spellings)
        for chosen, weight in spellings:
            for piece in chosen:
                expected[piece] += count * weight / total
    assert found == pytest.approx(expected)


def test_unigram_keeps_the_piece_that_the_text_is_made_of() -> None:
    tokenizer = train_unigram(["abc"] * 50 + ["a", "b", "c"], 9, byte_fallback=False)
    assert set(tokenizer.get_vocab()) == {*SPECIAL, UNKNOWN, "a", "b", "c", "abc"}
    assert tokenizer.tokenize("abcab?") == ["abc", "a", "b", "?"]
    assert tokenizer("?", add_special_tokens=False)["input_ids"] == [4]


def test_rare_characters_are_left_to_bytes() -> None:
    texts = ["ab " * 2000 + "€"]
    with_bytes = train_unigram(texts, 266).get_vocab()
    assert "€" not in with_bytes and "a" in with_bytes
    assert "€" in train_unigram(texts, 11, byte_fallback=False).get_vocab()


def test_unigram_is_the_same_in_every_process(tmp_path: Path) -> None:
    file = tmp_path / "texts"
    file.write_text("\f".join(TEXTS), encoding="utf-8")
    code = (
        "import sys, hashlib\n"
        "from raylign.tokenization.unigram import train_unigram\n"
        f"texts = open({str(file)!r}, newline='').read().split('\\f')\n"
        "t = train_unigram(texts, 450, ('<work>',))\n"
        "print(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())\n"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1 and len(seen.pop().strip()) == 64


def test_learning_stops_at_the_room_there_is() -> None:
    material, alphabet = _gather(TEXTS, True, 1.0)
    pieces, scores = learn_pieces(material, alphabet, 150)
    assert len(pieces) == len(set(pieces)) == 150
    assert set(alphabet) <= set(pieces)
    assert scores == sorted(scores, reverse=True)
    assert sum(map(math.exp, scores)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("unigram", 265, r"vocab_size=265 leaves no room for pieces: .* take 265; raise it"),
        ("unigram", 268, r"vocab_size=268 leaves no room for its characters"),
        ("unigram", 99_999, r"vocab_size=99999: the corpus yields only \d+ entries"),
        ("word", 9, r"vocab_size=9 leaves no room for words"),
        ("word", 99_999, r"vocab_size=99999: the corpus yields only \d+ entries"),
        ("char", 9, r"vocab_size=9 leaves no room for characters"),
        ("char", 5000, r"vocab_size=5000: the corpus yields only \d+ entries"),
        ("bpe", 200, r"vocab_size=200 leaves no room for merges"),
    ],
)
def test_sizes_that_do_not_fit(kind: str, size: int, message: str) -> None:
    vocabulary = VocabularyConfig.model_validate({"kind": kind})
    with pytest.raises(UserError, match=message):
        train(TEXTS, vocabulary, size, TAGS)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word", "char"])
def test_no_text(kind: str) -> None:
    with pytest.raises(UserError, match="corpus"):
        train([], VocabularyConfig.model_validate({"kind": kind}), None, TAGS)


def test_frequency_of_pairs() -> None:
    vocabulary = VocabularyConfig(min_frequency=10**6)
    with pytest.raises(UserError, match="the corpus yields only 264 entries"):
        train(TEXTS, vocabulary, 300, TAGS)


def test_loads_with_transformers(tmp_path: Path) -> None:
    train_unigram(TEXTS, 450, TAGS).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD[:2] + HARD[3:]:
        assert loaded.decode(loaded(text)["input_ids"]) == text
