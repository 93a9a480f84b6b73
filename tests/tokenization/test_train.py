from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raylign.config import TokenizerConfig, UserError
from raylign.data.textbook.arithmetic import Problem, write_exercise, write_textbook
from raylign.tokenization.train import SPECIAL, train_bpe

TAGS = TokenizerConfig().tags
TEXTS = list(write_textbook(300, 0, 3, 0.85)) + ["The language of the library is plain."] * 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Saved and loaded again, as every later stage sees it."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 400, TAGS).save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def test_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 400
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2, 3]
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == (
        "<pad>",
        "<eos>",
        None,
    )
    assert set(tokenizer.all_special_tokens) == set(SPECIAL)
    assert all(len(tokenizer(tag)["input_ids"]) == 1 for tag in TAGS)
    # Markup is no material for merges.
    assert not any("answer" in t for t in tokenizer.get_vocab() if t not in TAGS)


@pytest.mark.parametrize(
    "text",
    [
        *TEXTS[:5],
        "naïve 東京 😀 \u200d \x00 \t\r\n  trailing  ",
        " leading",
        "<work>a</work> <answer>b</answer>",
        "".join(map(chr, range(0x20, 0x250))),
        "",
    ],
)
def test_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_random_bytes_round_trip(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    alphabet = [chr(c) for c in (*range(1, 0xD800), *range(0xE000, 0x11000))]
    for _ in range(200):
        text = "".join(rng.choices(alphabet, k=20))
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_single_tokens_everywhere(tokenizer: PreTrainedTokenizerBase) -> None:
    digits = {d: tokenizer(d)["input_ids"] for d in "0123456789"}
    assert all(len(ids) == 1 for ids in digits.values())
    for text in ("123456", "What is 47 + 85?", "x9y 10.5 <work>7</work>"):
        tokens = tokenizer(text)["input_ids"]
        spelt = [t for t in tokens if [t] in digits.values()]
        assert spelt == [digits[c][0] for c in text if c.isdigit()]
    assert sum(any(c in digits for c in token) for token in tokenizer.get_vocab()) == 10


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 2?"},
        {"role": "assistant", "content": "<answer>3</answer>"},
        {"role": "user", "content": "Sure?"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "Be brief.\n<user>What is 1 + 2?<assistant><answer>3</answer><eos><user>Sure?<assistant>"
    )
    assert tokenizer.apply_chat_template(messages[1:2], tokenize=False) == "<user>What is 1 + 2?"
    with pytest.raises(Exception, match="unknown role: critic"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "x"}], tokenize=False)


def test_assistant_mask_covers_answers_and_their_end(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    for a in (7, 58, 904):
        first = write_exercise(Problem(a, "+", 5), rng, 0.5)
        second = write_exercise(Problem(a, "-", 5), rng, 0.5)
        messages = [{"role": "system", "content": "Add."}, *first, *second]
        encoded = tokenizer.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True
        )
        masked = [
            token
            for token, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
            if on
        ]
        answers = [m["content"] + "<eos>" for m in messages if m["role"] == "assistant"]
        assert tokenizer.decode(masked) == "".join(answers)


def test_training_is_deterministic(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_bpe(iter(TEXTS), 400, TAGS).save_pretrained(tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_own_chat_template(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    own = train_bpe(TEXTS, 300, (), template)
    assert own.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[a]"
    with pytest.raises(UserError, match=r"tokenizer\.chat_template=.*none\.jinja cannot be read"):
        train_bpe(TEXTS, 300, (), tmp_path / "none.jinja")


def test_vocabulary_must_fit_the_corpus() -> None:
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=5000: the corpus yields only \d+"):
        train_bpe(["tiny corpus"], 5000, TAGS)
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=264 leaves no room"):
        train_bpe(TEXTS, 264, TAGS)
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=1000: the corpus yields only"):
        train_bpe([], 1000)
