"""Judgements as token ids: a prompt as inference shows it, and what answers add to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from raylign.data.chat.encoding import Conversation, encode_continuations, encode_dialogues
from raylign.data.chat.faults import find_fault, list_special_tokens
from raylign.data.instructions import Continuation, Dialogue, Message
from raylign.data.preferences import Judgement, Preference, Reasoning, Text, Verdict

UNSCORED, SCORED, WRONG = 0, 1, 2
"""Marks of a token: not scored; an answer's own, or the end of a right step; of a wrong one."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What follows a prompt; both arrays have the same length."""

    token_ids: np.ndarray
    """int32 [a]"""
    marks: np.ndarray
    """uint8 [a]: `SCORED` for what the assistant says and the token that closes it; of steps, for
    the last token of each that is right, and `WRONG` of each that is wrong."""


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """A judgement as tokens."""

    prompt: np.ndarray
    """int32 [p], p > 0"""
    answers: tuple[Answer, ...]
    """Chosen and rejected; or one alone."""
    value: float = 0.0
    """The margin of a pair; 1 for a good answer and 0 for another."""
    row: int = 0
    """Row of the file that it comes from, from 1."""

    @property
    def longest(self) -> int:
        """Tokens of the prompt and its longest answer."""
        return len(self.prompt) + max(len(answer.token_ids) for answer in self.answers)


def encode_judgements(
    judgements: Sequence[Judgement], tokenizer: PreTrainedTokenizerBase, separator: str
) -> list[Compared | str]:
    """Each judgement as tokens, or why it cannot be.

    Answers are what the chat template adds to the prompt of inference, token by token; plain text
    is continued and closed by `eos`. `separator` closes the steps of a `Reasoning`.
    """
    encoder = _Encoder(tokenizer, separator)
    faults = [encoder.find_fault(each) for each in judgements]
    sound = [each for each, fault in zip(judgements, faults, strict=True) if fault is None]
    answered = [each for each in sound if not isinstance(each, Reasoning)]
    encoded = iter(encoder.encode_answered(answered))
    return [
        fault or (encoder.encode_steps(each) if isinstance(each, Reasoning) else next(encoded))
        for each, fault in zip(judgements, faults, strict=True)
    ]


def shorten(item: Compared, max_length: int, opening: int | None) -> Compared | str:
    """`item` within `max_length` tokens, or why nothing is left to compare.

    The prompt loses its beginning, down to half of the room; then answers lose their end. The token
    `opening`, where every text begins with it, stays.
    """
    size = len(item.prompt)
    kept = max(max_length - (item.longest - size), min(size, max_length // 2))
    prompt = item.prompt[size - kept :]
    if kept < size and item.prompt[0] == opening:
        prompt = np.concatenate([item.prompt[:1], prompt[1:]])
    room = max_length - kept
    answers = tuple(Answer(a.token_ids[:room], a.marks[:room]) for a in item.answers)
    if not all(answer.marks.any() for answer in answers):
        return "nothing to score within max_length"
    if len(answers) == 2 and np.array_equal(answers[0].token_ids, answers[1].token_ids):
        return "answers that differ only beyond max_length"
    return replace(item, prompt=prompt, answers=answers)


def part(item: Compared) -> list[Compared]:
    """A pair as a good answer and a bad one; anything else as it is."""
    if len(item.answers) == 1:
        return [item]
    return [
        replace(item, answers=(answer,), value=value)
        for answer, value in zip(item.answers, (1.0, 0.0), strict=True)
    ]


class _Encoder:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str) -> None:
        self._tokenizer, self._separator = tokenizer, separator
        self._special = tuple(list_special_tokens(tokenizer))
        self._closing = self._encode_text(separator)

    def find_fault(self, judgement: Judgement) -> str | None:
        """Why a judgement cannot be learned from; None when it can."""
        if isinstance(judgement, Reasoning):
            return self._find_step_fault(judgement)
        for answer in _list_answers(judgement):
            fault = self._find_answer_fault(judgement.prompt, answer)
            if fault is not None:
                return fault
        return None

    def encode_answered(self, judgements: Sequence[Preference | Verdict]) -> list[Compared | str]:
        """Sound judgements with answers, as tokens."""
        texts = [(each.prompt, answer) for each in judgements for answer in _list_answers(each)]
        tools = [each.tools for each in judgements for _ in _list_answers(each)]
        dialogues = [
            Dialogue([*prompt, *answer], tool, given=len(prompt))
            for (prompt, answer), tool in zip(texts, tools, strict=True)
            if not isinstance(prompt, str) and not isinstance(answer, str)
        ]
        plain = [
            Continuation(prompt, self._strip(answer))
            for prompt, answer in texts
            if isinstance(prompt, str) and isinstance(answer, str) and prompt
        ]
        rendered = iter(encode_dialogues(dialogues, self._tokenizer))
        continued = iter(encode_continuations(plain, self._tokenizer))

        def follow() -> Iterator[list[Conversation] | str]:
            for prompt, answer in texts:
                if not isinstance(answer, str):
                    yield next(rendered)
                else:
                    yield [next(continued) if prompt else self._begin(self._strip(answer))]

        found = follow()
        return [_compose(each, [next(found) for _ in _list_answers(each)]) for each in judgements]

    def encode_steps(self, judgement: Reasoning) -> Compared | str:
        """Prompt, and steps with a separator after each, whose last token is marked."""
        prompt = self._encode_prompt(judgement.prompt, judgement.tools)
        if isinstance(prompt, str):
            return prompt
        ids: list[int] = []
        marks: list[int] = []
        for step, right in zip(judgement.steps, judgement.right, strict=True):
            ids += self._encode_text(self._trim(step)) + self._closing
            marks += [UNSCORED] * (len(ids) - len(marks))
            marks[-1] = SCORED if right else WRONG
        answer = Answer(np.asarray(ids, np.int32), np.asarray(marks, np.uint8))
        return Compared(np.asarray(prompt, np.int32), (answer,))

    def _find_answer_fault(self, prompt: Text, answer: Text) -> str | None:
        if isinstance(prompt, str) or isinstance(answer, str):
            text = self._strip(answer) if isinstance(answer, str) else ""
            if not text.strip():
                return "an empty answer"
            return self._find_spelt(f"{prompt}\n{text}")
        fault = find_fault([*prompt, *answer], self._special)
        if fault is not None:
            return fault
        if not answer[0]["role"] == answer[-1]["role"] == "assistant":
            return "an answer that is not the assistant's"
        if prompt[-1]["role"] == "assistant":
            return "an answer that no question precedes"
        return None

    def _find_step_fault(self, judgement: Reasoning) -> str | None:
        if any(self._separator in self._trim(step) for step in judgement.steps):
            return f"a step that holds the separator {self._separator!r}"
        spelt = self._find_spelt("\n".join(judgement.steps))
        if spelt is not None or isinstance(judgement.prompt, str):
            return spelt or self._find_spelt(str(judgement.prompt))
        asked = [*judgement.prompt, {"role": "assistant", "content": judgement.steps[0]}]
        return find_fault(asked, self._special)

    def _find_spelt(self, text: str) -> str | None:
        spelt = next((token for token in self._special if token in text), None)
        return None if spelt is None else f"a text that spells the special token {spelt}"

    def _strip(self, text: str) -> str:
        """Without the `eos` that some write at the end."""
        return text.removesuffix(str(self._tokenizer.eos_token))

    def _trim(self, step: str) -> str:
        while step.endswith(self._separator):
            step = step.removesuffix(self._separator)
        return step

    def _encode_text(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _begin(self, text: str) -> Conversation:
        """A text without a prompt, after the token that opens texts."""
        opening = self._tokenizer.bos_token_id
        closing = self._tokenizer.eos_token_id
        ids = [closing if opening is None else opening, *self._encode_text(text), closing]
        trained = np.ones(len(ids), bool)
        trained[0] = False
        return Conversation(np.asarray(ids, np.int32), trained)

    def _encode_prompt(self, prompt: Text, tools: list[Message] | None) -> list[int] | str:
        if isinstance(prompt, str):
            ids = list(self._tokenizer(prompt)["input_ids"])
            return ids[:-1] if ids[-1] == self._tokenizer.eos_token_id else ids
        try:
            found = self._tokenizer.apply_chat_template(
                prompt, tools=tools, add_generation_prompt=True, return_dict=True
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return f"the chat template refuses it: {reason}"
        return list(found["input_ids"])


def _list_answers(judgement: Preference | Verdict) -> tuple[Text, ...]:
    if isinstance(judgement, Verdict):
        return (judgement.answer,)
    return judgement.chosen, judgement.rejected


def _compose(
    judgement: Preference | Verdict, found: Sequence[list[Conversation] | str]
) -> Compared | str:
    """One prompt and its answers, of whole texts."""
    prompts, answers = [], []
    for examples in found:
        if isinstance(examples, str):
            return examples
        if len(examples) != 1:
            return "an answer whose turns the chat template renders apart"
        ids, trained = examples[0].token_ids, examples[0].trained
        start = int(np.argmax(trained))
        prompts.append(ids[:start])
        answers.append(Answer(ids[start:], trained[start:].astype(np.uint8)))
    if not len(prompts[0]) or not all(np.array_equal(prompts[0], each) for each in prompts):
        return "a chat template that renders the prompt of two answers differently"
    if len(answers) == 2 and np.array_equal(answers[0].token_ids, answers[1].token_ids):
        return "answers that are the same in tokens"
    value = judgement.margin if isinstance(judgement, Preference) else float(judgement.good)
    return Compared(prompts[0], tuple(answers), value)
