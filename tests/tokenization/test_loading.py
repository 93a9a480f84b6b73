"""Tokenizers from elsewhere: directories, tiktoken's ranks, and what goes wrong."""

from __future__ import annotations

import base64
import random
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from raylign.config import UserError
from raylign.config.tokenizer import VocabularyConfig
from raylign.data.textbook.arithmetic import write_textbook
from raylign.models.loading import load_tokenizer, require_chat_template
from raylign.tokenization.loading import equip, find_local, load
from raylign.tokenization.ranks import ENCODINGS, PATTERNS, Ranks, convert, read_ranks, spell_bytes
from raylign.tokenization.special import SPECIAL
from raylign.tokenization.train import train_bpe
from raylign.tokenization.unigram import train_unigram

PAGES = [
    *write_textbook(120, 0, 3, 0.85),
    "We'll say it's HERE: CamelCase, snake_case and 123456 things.\r\n\r\n  Indented\n" * 3,
    "Der schnelle braune Fuchs springt über den faulen Hund; 東京の天気。" * 3,
]


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that was trained here, as tiktoken stores one."""
    file = tmp_path_factory.mktemp("ranks") / "own.tiktoken"
    vocabulary = train_bpe(PAGES, 700, single_digits=False).get_vocab()
    spell = {character: byte for byte, character in enumerate(spell_bytes())}
    lines = [
        base64.b64encode(bytes(spell[c] for c in token)) + f" {number - len(SPECIAL)}\n".encode()
        for token, number in sorted(vocabulary.items(), key=lambda item: item[1])
        if token not in SPECIAL
    ]
    file.write_bytes(b"".join(lines))
    return file


def build_encoding(ranks: Ranks) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        ranks.name,
        pat_str=ranks.pattern,
        mergeable_ranks=dict(ranks.ranks),
        special_tokens=dict(ranks.special),
    )


def draw_texts() -> list[str]:
    rng = random.Random(0)
    letters = "aehilnst ETH'.,\n\r\t  0123\u017fsü東😀\u0301\u200d\x85\xa0/_-"
    wide = [chr(c) for c in (*range(1, 0xD800), *range(0xE000, 0x11000))]
    drawn = ["".join(rng.choices(letters, k=60)) for _ in range(400)]
    drawn += ["".join(rng.choices(wide, k=40)) for _ in range(200)]
    return [*PAGES, *drawn, "", "<|endoftext|>", "a" * 3000, "\n" * 500, " " * 500 + "x"]


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_ids_are_those_of_tiktoken(pattern: str, rank_file: Path, tmp_path: Path) -> None:
    ranks = read_ranks(rank_file, pattern)
    encoding = build_encoding(ranks)
    converted = convert(ranks, PAGES)
    converted.save_pretrained(tmp_path)
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    loaded.encode_special_tokens = True
    for text in draw_texts():
        ids = loaded.encode(text, add_special_tokens=False).ids
        assert ids == encoding.encode_ordinary(text), text[:60]
        assert loaded.decode(ids, skip_special_tokens=False) == text
    assert len(converted) == encoding.n_vocab == 697
    marked = "a<|endoftext|>b"
    ids = AutoTokenizer.from_pretrained(tmp_path)(marked)["input_ids"]
    assert ids == encoding.encode(marked, allowed_special="all")
    assert converted.eos_token_id == 696


@pytest.fixture
def fetched(rank_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken with ranks from here in place of those that it would download."""
    from tiktoken import registry
    from tiktoken_ext import openai_public

    own = dict(read_ranks(rank_file).ranks)
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: own)
    monkeypatch.setattr(registry, "ENCODINGS", {})


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_the_patterns_are_those_of_tiktoken(name: str, fetched: None, rank_file: Path) -> None:
    from tiktoken_ext import openai_public

    theirs = getattr(openai_public, name)()["pat_str"]
    ranks = read_ranks(rank_file, ENCODINGS[name])
    ours, original = (
        build_encoding(Ranks("x", pattern, ranks.ranks, {})) for pattern in (ranks.pattern, theirs)
    )
    for text in draw_texts():
        assert ours.encode_ordinary(text) == original.encode_ordinary(text), repr(text)


def test_an_encoding_by_name(fetched: None) -> None:
    """cl100k_base: its special tokens keep their ids, and 16 ids between them have no token."""
    loaded = load(VocabularyConfig(load="tiktoken:cl100k_base"), PAGES)
    encoding = tiktoken.get_encoding("cl100k_base")
    assert len(loaded) == encoding.n_vocab == 100_277
    text = "What's <|fim_prefix|>1234?<|endofprompt|><|endoftext|>"
    assert loaded(text)["input_ids"] == encoding.encode(text, allowed_special="all")
    assert loaded.eos_token_id == encoding.eot_token == 100_257


def test_ids_between_ranks_and_special_tokens_are_filled(rank_file: Path) -> None:
    """An embedding needs rows for them all the same."""
    ranks = read_ranks(rank_file)
    gaps = Ranks("gaps", ranks.pattern, ranks.ranks, {"<|endoftext|>": 700, "<|fim|>": 705})
    converted = convert(gaps, PAGES)
    assert len(converted) == 706
    assert sorted(converted.get_vocab().values()) == list(range(706))
    assert converted.convert_tokens_to_ids(["<|endoftext|>", "<|fim|>"]) == [700, 705]
    assert converted("a<|fim|>")["input_ids"][-1] == 705


def test_random_ranks_convert_exactly() -> None:
    """Tokens that several pairs join to, as no training makes them."""
    for seed in range(40):
        rng = random.Random(seed)
        ranks = {bytes([byte]): byte for byte in range(256)}
        tokens = [b"a", b"b"]
        for _ in range(8):
            token = rng.choice(tokens) + rng.choice(tokens)
            if token not in ranks and len(token) < 6:
                ranks[token] = len(ranks)
                tokens.append(token)
        made = Ranks("x", PATTERNS["gpt2"], ranks, {"<|endoftext|>": len(ranks)})
        converted, encoding = convert(made, []), build_encoding(made)
        for _ in range(30):
            text = "".join(rng.choices("ab", k=12))
            assert converted(text)["input_ids"] == encoding.encode_ordinary(text)


def test_a_conversion_that_is_not_exact_is_refused() -> None:
    # `$` is the end of a line to one engine, and the end of the text to the other.
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"aa": 256}
    crooked = Ranks("x", r"\p{L}+$|\s|\p{L}", ranks, {})
    convert(crooked, ["aa"])
    with pytest.raises(UserError, match=r"x cannot be converted exactly; tiktoken spells 'aa.nb'"):
        convert(crooked, ["aa", "aa\nb"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not ranks at all\n", "line 1 is not a base64 token and its rank"),
        (b"YQ== 0\nYg== x\n", "line 2 is not a base64 token and its rank"),
        (b"YQ== 0\n", "byte 0 has no rank; give a complete file"),
        (b"", "byte 0 has no rank"),
        (
            b"".join(base64.b64encode(bytes([b])) + b" 7\n" for b in range(256)),
            "a rank occurs twice",
        ),
    ],
)
def test_files_that_hold_no_ranks(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.tiktoken"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_ranks(file)


def test_a_directory_is_loaded_as_it_is_and_equipped(tmp_path: Path) -> None:
    own = train_unigram(PAGES, 500)
    own.chat_template = None
    own.save_pretrained(tmp_path / "theirs")
    loaded = load(VocabularyConfig(load=str(tmp_path / "theirs")))
    text = "<work>1 + 2</work> naïve <eos>"
    assert loaded(text)["input_ids"] == own(text)["input_ids"]
    assert equip(loaded, ("<work>", "</work>"), None) == ["<work>", "</work>"]
    loaded.save_pretrained(tmp_path / "stage")
    again = load_tokenizer(tmp_path / "stage")
    require_chat_template(again, tmp_path)
    assert len(again) == 502
    assert again("plain text")["input_ids"] == own("plain text")["input_ids"]
    assert again("<work>")["input_ids"] == [500]


def test_ranks_are_equipped_with_chat(rank_file: Path, tmp_path: Path) -> None:
    loaded = load(VocabularyConfig(load=f"tiktoken:{rank_file}", pattern="gpt2"), PAGES)
    assert equip(loaded, ("<work>",), None) == ["<user>", "<assistant>", "<work>"]
    loaded.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.eos_token == "<|endoftext|>" and len(again) == 700
    ids = again.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        return_dict=True,
    )["input_ids"]
    assert ids[0] == 697 and ids[-1] == 696


def test_equipping_keeps_a_template_and_its_tokens(tmp_path: Path) -> None:
    train_bpe(PAGES, 400, ("<work>",)).save_pretrained(tmp_path)
    loaded = load(VocabularyConfig(load=str(tmp_path)))
    assert equip(loaded, ("<work>",), None) == []
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[0]['content'] }}")
    assert equip(loaded, (), own) == []
    assert loaded.chat_template == own.read_text()
    loaded.chat_template, loaded.eos_token = None, None
    assert equip(loaded, (), own) == []  # it has <eos>, which is named again
    assert loaded.eos_token_id == 1


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "file.txt").write_text("x")
    for name, message in {
        "empty": "holds no usable tokenizer",
        "wrong": "names no model",
        "broken": "holds no usable tokenizer",
        "file.txt": "give the directory of a tokenizer",
        "none": "no such file or directory",
    }.items():
        with pytest.raises(UserError, match=message):
            load(VocabularyConfig(load=str(tmp_path / name)))
    with pytest.raises(UserError, match="neither a directory nor a name of the hub"):
        load(VocabularyConfig(load="runs/a/tokenizer"))
    with pytest.raises(UserError, match=r"none\.tiktoken: no such file or directory"):
        load(VocabularyConfig(load="none.tiktoken"))
    with pytest.raises(UserError, match=r"tiktoken:gpt9: not an encoding.* choose from gpt2, "):
        load(VocabularyConfig(load="tiktoken:gpt9"))


def test_what_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be fetched from the Hugging Face hub"):
        load(VocabularyConfig(load="nobody/has-this-tokenizer"))
    with pytest.raises(UserError, match="tiktoken:gpt2: its ranks cannot be fetched"):
        load(VocabularyConfig(load="tiktoken:gpt2"))


def test_what_is_local(rank_file: Path, tmp_path: Path) -> None:
    assert find_local(VocabularyConfig()) is None
    assert find_local(VocabularyConfig(load="tiktoken:gpt2")) is None
    assert find_local(VocabularyConfig(load="org/name")) is None
    assert find_local(VocabularyConfig(load=str(tmp_path))) == tmp_path
    assert find_local(VocabularyConfig(load=f"tiktoken:{rank_file}")) == rank_file
