"""Which tokens fine-tuning trains, and which rows it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from raylign.config import UserError
from raylign.data.chat import Conversation, encode_dialogues, find_fault, read_demonstrations
from raylign.data.instructions import Dialogue
from raylign.models.loading import load_tokenizer
from raylign.tokenization.train import train_bpe


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def bytewise() -> PreTrainedTokenizerBase:
    """Our own kind of tokenizer, with its own chat template."""
    return train_bpe(["one two three four five " * 3] * 9, 274, ("<work>", "</work>"))


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
}


def say(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn."""
    turns = [
        {"role": ("user", "assistant")[place % 2], "content": content}
        for place, content in enumerate(contents)
    ]
    return [{"role": "system", "content": system}, *turns] if system else turns


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *train_on: str
) -> Conversation:
    """The only example of a conversation."""
    [found] = encode_dialogues([Dialogue(messages)], tokenizer, train_on or ("assistant",))
    assert not isinstance(found, str), found
    [example] = found
    return example


def show_trained(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *train_on: str
) -> str:
    """The conversation's tokens, those that are trained in brackets."""
    found = encode(tokenizer, messages, *train_on)
    names = tokenizer.convert_ids_to_tokens(found.token_ids.tolist())
    return " ".join(
        f"[{n}]" if trained else n for n, trained in zip(names, found.trained, strict=True)
    )


def test_only_what_the_assistant_says_is_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    assert show_trained(tokenizer, say("w1 w2", "w3")) == "<user> w1 w2 <assistant> [w3] [<eos>]"
    assert show_trained(tokenizer, say("w1", "w2", "w3", "w4 w5")) == (
        "<user> w1 <assistant> [w2] [<eos>] <user> w3 <assistant> [w4] [w5] [<eos>]"
    )


def test_a_trailing_question_is_not_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    assert show_trained(tokenizer, say("w1", "w2", "w3")) == (
        "<user> w1 <assistant> [w2] [<eos>] <user> w3"
    )


def test_the_project_template_marks_answers_with_tags_and_unicode(
    bytewise: PreTrainedTokenizerBase,
) -> None:
    messages = say("2 plus 2?", "<work>été 四</work> 4", "ok?", " yes ", system="be kind")
    found = encode(bytewise, messages)
    assert bytewise.decode(found.token_ids) == (
        "be kind\n<user>2 plus 2?<assistant><work>été 四</work> 4<eos>"
        "<user>ok?<assistant> yes <eos>"
    )
    assert bytewise.decode(found.token_ids[found.trained]) == (
        "<work>été 四</work> 4<eos> yes <eos>"
    )


def test_an_answer_follows_exactly_the_prompt_of_inference(
    bytewise: PreTrainedTokenizerBase,
) -> None:
    messages = say("1+1", "two", "and 2", "four")
    found = encode(bytewise, messages)
    for place in (1, 3):
        prompt = bytewise.apply_chat_template(
            messages[:place], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert found.token_ids[: len(prompt)].tolist() == prompt
        assert found.trained[len(prompt)] and not found.trained[len(prompt) - 1]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        # A generation prompt that says more than the template's own turn does.
        ("{% if add_generation_prompt %}<assistant>w9{% endif %}", "prefixes of its conversations"),
        ("{% if add_generation_prompt %}<user>{% endif %}", "prefixes of its conversations"),
        ("", "do not start where its prompts end"),
    ],
)
def test_a_template_that_contradicts_itself_is_noticed(
    tiny_model: Path, template: str, reason: str
) -> None:
    tokenizer = load_tokenizer(tiny_model)
    whole = tokenizer.chat_template
    prompt = "{% if add_generation_prompt %}<assistant>{% endif %}"
    assert prompt in whole
    tokenizer.chat_template = whole.replace(prompt, template)
    [found] = encode_dialogues([Dialogue(say("w1", "w2"))], tokenizer)
    assert isinstance(found, str) and reason in found


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "no messages"),
        ([], "no messages"),
        ("hello", "no messages"),
        (["hello"], "a message that is not an object"),
        ([{"role": "user"}], "a message without text content"),
        ([{"role": "user", "content": ["a"]}], "a message without text content"),
        (say("w1", "  \n"), "a message without text content"),
        (say("w1", "w2<eos>w3"), "a message that spells the special token <eos>"),
        ([{"role": "critic", "content": "x"}], "unknown role 'critic'"),
        ([{"content": "x"}], "unknown role None"),
        (say("w1"), "no assistant turn"),
        (say("w1", "w2")[::-1], "an assistant that nobody asked"),
        (say("w1", "w2", system="w3")[::2], "an assistant that nobody asked"),
        ([*say("w1", "w2"), {"role": "system", "content": "x"}], "a system message that is not"),
        ([*say("w1", "w2"), {"role": "tool", "content": "x"}], "a tool's result that no call"),
        ([*say("w1"), CALL, *[{"role": "tool", "content": "x"}] * 2], None),
        ([*say("w1"), CALL | {"tool_calls": [{"function": {"name": "<eos>"}}]}], "a message that"),
        ([*say("w1"), CALL | {"tool_calls": []}], "a message without text content"),
        ([*say("w1", "w2"), *say("w1", "w2")[1:]], None),
        (say("w1", "w2", system="w3"), None),
    ],
)
def test_faults_are_told_apart(messages: object, reason: str | None) -> None:
    found = find_fault(messages, ("<eos>",))
    assert found is None if reason is None else found is not None and found.startswith(reason)


def write(file: Path, *lines: str) -> Path:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def row(*contents: str) -> str:
    return json.dumps({"messages": say(*contents)})


def test_unusable_rows_are_counted_with_their_line(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    good = [row("w1", f"w{n}") for n in range(1, 40)]
    file = write(tmp_path / "d.jsonl", *good[:20], "", "{oops", *good[20:], row("w1", "w2 " * 9))
    found = read_demonstrations(file, tokenizer, max_length=8)
    assert len(found.conversations) == 39
    assert [(r.row, r.reason) for r in found.rejected] == [
        (22, "not valid JSON"),
        (42, "longer than sequence_length"),
    ]
    texts = [tokenizer.decode(c.token_ids[c.trained][:1]) for c in found.conversations]
    assert texts == [f"w{n}" for n in range(1, 40)], "rows stay in order"


def test_too_many_unusable_rows_are_an_error_in_one_line(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    bad = ['{"text": "x"}', row("w1"), '{"text": "y"}']
    file = write(tmp_path / "d.jsonl", *[row("w1", "w2")] * 50, *bad)
    with pytest.raises(UserError) as caught:
        read_demonstrations(file, tokenizer, max_length=8)
    assert str(caught.value) == (
        f"demonstrations {file}: 3 of 53 rows cannot be used: 2 x no `messages` column (first in "
        "row 51); 1 x no assistant turn (first in row 52); put them right or take them out"
    )


def test_no_usable_rows_are_an_error(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not exist"):
        read_demonstrations(tmp_path / "none.jsonl", tokenizer, 8)
    with pytest.raises(UserError, match="are empty"):
        read_demonstrations(write(tmp_path / "d.jsonl", "", " "), tokenizer, 8)
    with pytest.raises(UserError, match="1 of 1 rows cannot be used"):
        read_demonstrations(write(tmp_path / "d.jsonl", "[1]"), tokenizer, 8)
