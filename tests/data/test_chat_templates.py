"""Which tokens are trained under templates like those of the hub, compared one by one.

Where TRL has a version of a template that marks answers, its masks are ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from raylign.data.chat import (
    Conversation,
    encode_dialogues,
    find_closing,
    read_demonstrations,
)
from raylign.data.chat.display import list_tokens, render_tokens
from raylign.data.chat.encoding import encode_continuations
from raylign.data.instructions import Continuation, Dialogue
from raylign.models.loading import load_tokenizer
from raylign.tokenization.train import train_bpe

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Contents are trimmed, roles alternate, tools go into the first question: as Llama 3.1 does.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% set head = '<|start_header_id|>' %}"
    "{{ head + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}"
    "{% if loop.first and tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '\n\n' }}"
    "{% endif %}{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}"
    "{{ raise_exception('one call at a time!') }}{% endif %}{% set f = m.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' + (f.arguments | tojson) + '}' }}"
    "{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
# Only the last answer shows its reasoning, as Qwen 3 does.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


TWICE = [user("one two"), assistant("two one"), user("x"), assistant(" yes ")]
TOOLS = [user("1?"), CALL, {"role": "tool", "content": "2"}, assistant("It is 2")]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    made = train_bpe(["one two three user assistant system yes" * 3] * 9, 280, ())
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL), "bos_token": "<bos>"})
    return made


def encode(
    tokenizer: PreTrainedTokenizerBase, template: str, dialogue: Dialogue, *train_on: str
) -> list[Conversation]:
    tokenizer.chat_template = template
    [found] = encode_dialogues([dialogue], tokenizer, train_on or ("assistant",))
    assert not isinstance(found, str), found
    return found


def spell(tokenizer: PreTrainedTokenizerBase, found: Conversation) -> str:
    """The text, with trained stretches in brackets."""
    text, inside = "", False
    for token, trained in zip(found.token_ids, [*found.trained], strict=True):
        text += ("[" if trained and not inside else "]" if inside and not trained else "") + (
            tokenizer.decode([token])
        )
        inside = bool(trained)
    return (text + "]" * inside).replace("<|im_start|>", "<").replace("<|im_end|>", ">")


def test_marks_and_prefixes_agree(tokenizer: PreTrainedTokenizerBase) -> None:
    by_marks, by_prefixes = (
        encode(tokenizer, template, Dialogue(TWICE)) for template in (MARKED, CHATML)
    )
    assert spell(tokenizer, by_prefixes[0]) == (
        "<user\none two>\n<assistant\n[two one>]\n<user\nx>\n<assistant\n[ yes >]\n"
    )
    assert len(by_marks) == len(by_prefixes) == 1
    assert by_marks[0].token_ids.tolist() == by_prefixes[0].token_ids.tolist()
    assert by_marks[0].trained.tolist() == by_prefixes[0].trained.tolist()
    assert find_closing(by_marks, tokenizer) == "<|im_end|>"
    unclosed = encode(tokenizer, CHATML.replace("<|im_end|>", ""), Dialogue(TWICE[:2]))
    assert find_closing(unclosed, tokenizer) is None


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_words_of_other_roles(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    dialogue = Dialogue([{"role": "system", "content": "system one"}, *TWICE[:2]])
    shown = {
        roles: spell(tokenizer, encode(tokenizer, template, dialogue, *roles)[0])
        for roles in (("user",), ("system",), ("user", "assistant"))
    }
    assert shown == {
        ("user",): "<system\nsystem one>\n<user\n[one two>]\n<assistant\ntwo one>\n",
        ("system",): "<system\n[system one>]\n<user\none two>\n<assistant\ntwo one>\n",
        ("user", "assistant"): "<system\nsystem one>\n<user\n[one two>]\n<assistant\n[two one>]\n",
    }
    repeated = Dialogue([user("user"), assistant("assistant")])
    [found] = encode(tokenizer, template, repeated, "user")
    assert spell(tokenizer, found) == "<user\n[user>]\n<assistant\nassistant>\n"


def test_what_is_given_is_not_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    for template in (CHATML, MARKED):
        [found] = encode(tokenizer, template, Dialogue(TWICE, given=3))
        assert spell(tokenizer, found) == (
            "<user\none two>\n<assistant\ntwo one>\n<user\nx>\n<assistant\n[ yes >]\n"
        )
    [fault] = encode_dialogues([Dialogue(TWICE[:3], given=2)], tokenizer)
    assert fault == "no assistant turn in the completion"


def test_roles_may_follow_themselves(tokenizer: PreTrainedTokenizerBase) -> None:
    both = [user("a"), user("b"), assistant("c"), assistant("d")]
    [found] = encode(tokenizer, CHATML, Dialogue(both))
    assert spell(tokenizer, found) == "<user\na>\n<user\nb>\n<assistant\n[c>]\n<assistant\n[d>]\n"


def test_calls_and_results_of_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    [found] = encode(tokenizer, LLAMA, Dialogue(TOOLS, [SCHEMA]))
    text = spell(tokenizer, found).replace("<|start_header_id|>", "<h>")
    text = text.replace("<|end_header_id|>\n\n", "</h>").replace("<|eot_id|>", ".")
    schema = '{"type": "function", "function": {"name": "add", "parameters": {}}}'
    assert text == (
        f"<bos><h>user</h>{schema}\n\n1?.<h>assistant</h>"
        '[{"name": "add", "parameters": {"a": 1}}.]<h>ipython</h>2.<h>assistant</h>[It is 2.]'
    )
    [found] = encode(tokenizer, LLAMA, Dialogue(TOOLS, [SCHEMA]), "tool")
    assert tokenizer.decode(found.token_ids[found.trained]) == "2<|eot_id|>"


def test_an_answer_that_the_template_rewrites_later_has_an_example_of_its_own(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for messages in (TWICE, [*TWICE, user("bye")]):
        found = encode(tokenizer, FORGETFUL, Dialogue(messages))
        assert [spell(tokenizer, each) for each in found] == [
            "<user\none two>\n<assistant\ntwo one>\n<user\nx>\n<assistant\n[<think>\n yes >]\n",
            "<user\none two>\n<assistant\n[<think>\ntwo one>]\n",
        ]


@pytest.mark.parametrize(
    ("template", "dialogue", "reason"),
    [
        (CHATML, Dialogue(TOOLS, [SCHEMA]), "a chat template that leaves out tools"),
        (CHATML, Dialogue(TOOLS), "a chat template that leaves out tool calls"),
        (LLAMA, Dialogue([user("a"), CALL | {"tool_calls": CALL["tool_calls"] * 2}]), "the chat "),
        ("{{ messages[9].content }}", Dialogue(TWICE), "the chat template refuses it: "),
        (
            CHATML.replace("m.content +", ""),
            Dialogue(TWICE),
            "a chat template that leaves out what",
        ),
        (
            MARKED.replace("m.content +", ""),
            Dialogue(TWICE),
            "a chat template that leaves out what",
        ),
        (
            CHATML.replace("assistant\n' }}", "assistant\n<think>' }}"),
            Dialogue(TWICE),
            "a chat template whose prompts are not prefixes of its conversations",
        ),
        (
            MARKED.replace("{{ '<|im_start|>assistant\n' }}{% gen", "{% gen", 1),
            Dialogue(TWICE),
            "a chat template whose prompts are not prefixes",
        ),
        (
            MARKED.replace("m.role == 'assistant'", "m.role != 'tool'"),
            Dialogue(TWICE),
            "a chat template that does not mark each answer once",
        ),
    ],
)
def test_what_a_template_garbles_is_refused_with_a_reason(
    tokenizer: PreTrainedTokenizerBase, template: str, dialogue: Dialogue, reason: str
) -> None:
    tokenizer.chat_template = template
    good = Dialogue([user("a"), assistant("b")])
    [fault, _] = encode_dialogues([dialogue, good], tokenizer)
    assert isinstance(fault, str) and fault.startswith(reason)


def test_plain_text_needs_no_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    eos = tokenizer.eos_token
    pairs = [("one ", "two"), ("on", "e three"), ("x", f"yes{eos}")]
    found = encode_continuations([Continuation(*pair) for pair in pairs], tokenizer)
    for (prompt, completion), each in zip(pairs, found, strict=True):
        before = tokenizer(prompt)["input_ids"]
        assert each.token_ids[~each.trained].tolist() == before, "as at inference"
        text = tokenizer.decode(each.token_ids[each.trained])
        assert text == completion.removesuffix(eos) + eos, "closed once"
    whole = tokenizer("one" + " three")["input_ids"]
    assert found[1].token_ids.tolist()[:-1] != whole, "a seam is never tokenised over"


def test_tokens_are_shown_with_role_and_mask(tokenizer: PreTrainedTokenizerBase) -> None:
    dialogue = Dialogue([user("one"), assistant("yes é")])
    [found] = encode(tokenizer, CHATML, dialogue)
    shown = list_tokens(found, dialogue, tokenizer)
    assert [each.token_id for each in shown] == found.token_ids.tolist()
    assert [each.trained for each in shown] == found.trained.tolist()
    names = [each.role for each in shown]
    assert names == ["user"] * names.count("user") + ["assistant"] * names.count("assistant")
    assert "".join(each.text for each in shown if each.role == "user") == (
        "<|im_start|>user\none<|im_end|>\n"
    )
    assert [each.text for each in shown][-4:-2] == ["Ã", "©"], "pieces of a character"
    lines = list(render_tokens(shown))
    assert lines[0][0].split() == ["0", "user", str(shown[0].token_id), "'<|im_start|>'"]
    assert [" train " in line for line, _ in lines] == [trained for _, trained in lines]
    rewritten = encode(tokenizer, FORGETFUL, Dialogue(TWICE))
    roles = [each.role for each in list_tokens(rewritten[0], Dialogue(TWICE), tokenizer)]
    assert list(dict.fromkeys(roles)) == ["user", "assistant"] and roles[-1] == "assistant"
    plain = Continuation("one", " two")
    [each] = encode_continuations([plain], tokenizer)
    assert {t.role for t in list_tokens(each, plain, tokenizer)} == {"prompt", "completion"}


TRL_TEMPLATES = ("qwen2_5", "llama3", "gemma", "gemma3", "phi3", "cohere")


@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_masks_are_those_of_trl_s_marked_templates(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """But for blanks around an answer, which TRL's marks include."""
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    names = ["<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>"]
    names += ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL, *names]})
    messages = [user("one two"), assistant("two"), user("x"), assistant("yes, one")]
    [ours] = encode(tokenizer, (folder / f"{name}.jinja").read_text("utf-8"), Dialogue(messages))
    tokenizer.chat_template = (folder / f"{name}_training.jinja").read_text("utf-8")
    theirs = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ours.token_ids.tolist() == theirs["input_ids"]
    pairs = zip(ours.trained.tolist(), theirs["assistant_masks"], strict=True)
    differ = [place for place, (one, other) in enumerate(pairs) if one != bool(other)]
    assert not tokenizer.decode(ours.token_ids[differ]).strip()
    assert all(theirs["assistant_masks"][place] for place in differ)
    [marked] = encode(tokenizer, tokenizer.chat_template, Dialogue(messages))
    assert [t for t in ours.token_ids[ours.trained] if tokenizer.decode([t]).strip()] == [
        t for t in marked.token_ids[marked.trained] if tokenizer.decode([t]).strip()
    ]


@pytest.mark.slow
def test_examples_are_those_of_trl_s_trainer(tiny_model: Path, tmp_path: Path) -> None:
    """Of messages, of prompt and completion as messages, and of both as text."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = load_tokenizer(tiny_model)
    chats = [
        [user("w1 w2"), assistant("w3")],
        [user("w4"), assistant("w5 w6"), user("w7"), assistant("w8")],
    ]
    given = [[user("w1"), assistant("w2"), user("w3")], [user("w9")]]
    plain = [{"prompt": "w1 w2", "completion": " w3 w4"}, {"prompt": "w5", "completion": " w6"}]
    sets: list[tuple[list[dict[str, Any]], dict[str, bool]]] = [
        ([{"messages": chat} for chat in chats], {"assistant_only_loss": True}),
        ([{"prompt": turns, "completion": [assistant("w8 w7")]} for turns in given], {}),
        (plain, {}),
    ]
    for rows, options in sets:
        settings = trl.SFTConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, **options
        )
        trainer = trl.SFTTrainer(
            str(tiny_model),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        ours = read_demonstrations(file, tokenizer, 64).conversations
        for one, other in zip(ours, trainer.train_dataset, strict=True):
            assert one.token_ids.tolist() == other["input_ids"]
            assert [
                token if trained else -100
                for token, trained in zip(one.token_ids.tolist(), one.trained, strict=True)
            ] == other["labels"]
