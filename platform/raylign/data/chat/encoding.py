"""Which tokens of a conversation are trained: exactly those that a model asked would have to say.

Where the chat template marks answers itself ({% generation %}), its marks are taken. Where it does
not, as most templates, an answer is what rendering adds between the prompt of inference (the
messages before, and the generation prompt) and the end of the message. Both are compared token by
token with what is trained: an answer always follows the very tokens that inference would show.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from raylign.data.chat.faults import list_special_tokens
from raylign.data.instructions import Continuation, Dialogue, Message

_MARK = re.compile(r"\{%[-+]?\s*generation\b")

Span = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """One conversation; both arrays have length n."""

    token_ids: np.ndarray
    """int32 [n]"""
    trained: np.ndarray
    """bool [n]: True for what the trained roles say, the token that closes a turn included."""
    row: int = 0
    """Row of the file that it comes from, from 1."""


class Garbled(ValueError):
    """Why the chat template does not fit a conversation."""


def marks_answers(tokenizer: PreTrainedTokenizerBase, tools: bool = False) -> bool:
    """Whether the chat template says itself what the assistant says."""
    template = tokenizer.get_chat_template(tools=[{}] if tools else None)
    return _MARK.search(template) is not None


def encode_dialogues(
    dialogues: Sequence[Dialogue],
    tokenizer: PreTrainedTokenizerBase,
    train_on: Sequence[str] = ("assistant",),
) -> list[list[Conversation] | str]:
    """Every dialogue as examples in which each turn of `train_on` is trained once, or why not.

    There is one example where the template only ever appends. Where it rewrites earlier turns (as
    by leaving out their reasoning) a turn that would stand after another prompt than at inference
    is trained in an example of its own, which ends with it.
    """
    encoder = _Encoder(tokenizer, tuple(train_on))
    plans = [encoder.plan(dialogue) for dialogue in dialogues]
    texts = list({text for plan in plans if not isinstance(plan, str) for text in plan.list()})
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    ids = dict(zip(texts, rows, strict=True))
    ids |= {p.whole: p.marked[0] for p in plans if not isinstance(p, str) and p.marked}
    return [plan if isinstance(plan, str) else encoder.compose(plan, ids) for plan in plans]


def find_closing(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """The special token that most examples end what is trained with; None where it is none."""
    special = {index: token for token, index in list_special_tokens(tokenizer).items()}
    last = (int(each.token_ids[np.flatnonzero(each.trained)[-1]]) for each in conversations)
    [(token, _)] = Counter(last).most_common(1)
    return special.get(token)


def encode_continuations(
    continuations: Sequence[Continuation], tokenizer: PreTrainedTokenizerBase
) -> list[Conversation]:
    """Prompt and completion as one sequence, closed by `eos`, with the completion trained.

    The prompt's tokens are those it has alone, as at inference. The completion is tokenised with
    its prompt where that leaves the prompt's tokens as they are, and else by itself.
    """
    if not continuations:
        return []
    eos = tokenizer.eos_token_id
    prompts = tokenizer([c.prompt for c in continuations])["input_ids"]
    wholes = tokenizer([c.prompt + c.completion for c in continuations])["input_ids"]
    encoded = []
    for continuation, prompt, whole in zip(continuations, prompts, wholes, strict=True):
        start = prompt[:-1] if prompt[-1] == eos else prompt  # some tokenizers close every text
        if whole[: len(start)] == start and len(whole) > len(start):
            ids = whole
        else:
            alone = tokenizer(continuation.completion, add_special_tokens=False)["input_ids"]
            ids = start + alone
        ids = ids if ids[-1] == eos else [*ids, eos]
        encoded.append(_mark(ids, [(len(start), len(ids))]))
    return encoded


@dataclass(frozen=True, slots=True)
class _Plan:
    """The renderings that decide what is trained in a dialogue."""

    dialogue: Dialogue
    turns: list[int]
    """Messages to train."""
    whole: str
    prompts: dict[int, str] = field(default_factory=dict)
    """What inference shows before an assistant's message."""
    ends: dict[int, str] = field(default_factory=dict)
    """The conversation up to a message."""
    others: dict[int, str] = field(default_factory=dict)
    """The same with other words in a message that is not an assistant's."""
    marked: tuple[list[int], list[int]] | None = None
    """Tokens of `whole`, and those that the template marks."""

    def list(self) -> Iterator[str]:
        """Every text that is still to be tokenised."""
        if self.marked is None:
            yield self.whole
        for texts in (self.prompts, self.ends, self.others):
            yield from texts.values()


class _Encoder:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: tuple[str, ...]) -> None:
        self._tokenizer, self._train_on = tokenizer, train_on
        self._special = frozenset(list_special_tokens(tokenizer).values())

    def plan(self, dialogue: Dialogue) -> _Plan | str:
        """What to render of a dialogue, or why it cannot be rendered."""
        try:
            return self._plan(dialogue)
        except Garbled as error:
            return str(error)

    def compose(self, plan: _Plan, ids: Mapping[str, list[int]]) -> list[Conversation] | str:
        """The examples of a plan, from the tokens of its texts, or why there are none."""
        try:
            return [_mark(tokens, spans) for tokens, spans in self._compose(plan, ids)]
        except Garbled as error:
            return str(error)

    def _plan(self, dialogue: Dialogue) -> _Plan:
        messages, tools = dialogue.messages, dialogue.tools
        marks = "assistant" in self._train_on and marks_answers(self._tokenizer, bool(tools))
        turns = [
            place
            for place, message in enumerate(messages)
            if place >= dialogue.given and message["role"] in self._train_on
        ]
        if not turns:
            raise Garbled(f"no {' or '.join(self._train_on)} turn in the completion")
        whole = self._render(messages, tools)
        _require_calls(dialogue, whole)
        marked = self._render_marked(dialogue) if marks else None
        plan = _Plan(dialogue, turns, whole, marked=marked)
        for place, message in enumerate(messages):
            if message["role"] == "assistant" and (marks or place in turns):
                plan.prompts[place] = self._render(messages[:place], tools, prompt=True)
        for place in turns:
            before, message = messages[:place], messages[place]
            if not (marks and message["role"] == "assistant"):
                last = place == len(messages) - 1
                plan.ends[place] = whole if last else self._render(messages[: place + 1], tools)
            if message["role"] != "assistant":
                letter = "y" if message["content"].strip()[0] == "x" else "x"
                plan.others[place] = self._render([*before, message | {"content": letter}], tools)
        return plan

    def _render(self, messages: list[Message], tools: Any, prompt: bool = False) -> str:
        return self._apply(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)

    def _render_marked(self, dialogue: Dialogue) -> tuple[list[int], list[int]]:
        found = self._apply(
            dialogue.messages,
            tools=dialogue.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return found["input_ids"], found["assistant_masks"]

    def _apply(self, messages: list[Message], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise Garbled(f"the chat template refuses it: {reason}") from None

    def _compose(
        self, plan: _Plan, ids: Mapping[str, list[int]]
    ) -> Iterator[tuple[list[int], list[Span]]]:
        """(tokens, trained spans) of every example."""
        answers = {} if plan.marked is None else self._read_marks(plan, ids)
        left, text, first = plan.turns, plan.whole, True
        while left:
            found = dict(answers) if first else {}
            for place in left:
                span = None if place in answers else self._locate(plan, place, ids, text)
                if span is not None:
                    found[place] = span
            if found:
                yield ids[text], list(found.values())
            elif not first:
                raise Garbled("a chat template whose prompts are not prefixes of its conversations")
            left = [place for place in left if place not in found]
            if left:
                text, first = plan.ends[left[-1]], False

    def _read_marks(self, plan: _Plan, ids: Mapping[str, list[int]]) -> dict[int, Span]:
        """Trained span of each assistant turn to train, as the template marks it.

        Every answer must be marked, start where its prompt ends, and nothing else may be marked but
        the end of the prompt, which is not trained.
        """
        assert plan.marked is not None
        tokens, mask = plan.marked
        edges = np.flatnonzero(np.diff(np.asarray([0, *mask, 0], np.int8))).tolist()
        runs = list(zip(edges[::2], edges[1::2], strict=True))
        if len(runs) != len(plan.prompts):
            raise Garbled("a chat template that does not mark each answer once")
        spans = {}
        for (place, text), (start, end) in zip(plan.prompts.items(), runs, strict=True):
            prompt = ids[text]
            if tokens[: len(prompt)] != prompt:
                raise Garbled("a chat template whose prompts are not prefixes of its conversations")
            if not start <= len(prompt) < end:
                raise Garbled("a chat template whose marks do not start where its prompts end")
            if place in plan.turns:
                spans[place] = self._require_words(tokens, len(prompt), end)
        return spans

    def _locate(
        self, plan: _Plan, place: int, ids: Mapping[str, list[int]], text: str
    ) -> Span | None:
        """What of a rendering is the message at `place` and trained; None where it is not proved.

        It has to follow the prompt of inference, and to be whole: what the message's own rendering
        has beyond may be special tokens and blanks that only end a conversation.
        """
        whole, alone = ids[text], ids[plan.ends[place]]
        end = share_prefix(whole, alone)
        if place in plan.prompts:
            prompt = ids[plan.prompts[place]]
            start = len(prompt)
            if whole[:start] != prompt:
                return None
        else:
            start = share_prefix(alone, ids[plan.others[place]])
        if start >= end or not self._is_glue(alone[end:]):
            return None
        closing = [at for at in range(start, end) if whole[at] in self._special]
        if closing and self._is_glue(whole[closing[-1] : end]):
            # A line break after it is the template's.
            return self._require_words(whole, start, closing[-1] + 1)
        complete = end == len(alone) or place not in plan.prompts
        return self._require_words(whole, start, end) if complete else None

    def _require_words(self, tokens: list[int], start: int, end: int) -> Span:
        if self._is_glue(tokens[start:end]):
            raise Garbled("a chat template that leaves out what a message says")
        return start, end

    def _is_glue(self, tokens: list[int]) -> bool:
        """Whether there are but special tokens and blanks."""
        words = [token for token in tokens if token not in self._special]
        return not words or not self._tokenizer.decode(words).strip()


def _require_calls(dialogue: Dialogue, text: str) -> None:
    """Tools and calls must be in the rendering; many templates know neither and say nothing."""
    tools = dialogue.tools or []
    names = [tool.get("function", tool).get("name") for tool in tools]
    if any(isinstance(name, str) and name not in text for name in names):
        raise Garbled("a chat template that leaves out tools")
    for message in dialogue.messages:
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                raise Garbled("a chat template that leaves out tool calls")


def share_prefix(one: list[int], other: list[int]) -> int:
    """Length of the longest prefix that both have."""
    shortest = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:shortest]) != np.asarray(other[:shortest]))
    return int(differ[0]) if len(differ) else shortest


def _mark(tokens: Sequence[int], spans: Sequence[Span]) -> Conversation:
    trained = np.zeros(len(tokens), bool)
    for start, end in spans:
        trained[start:end] = True
    trained[:1] = False  # nothing predicts it
    return Conversation(np.asarray(tokens, np.int32), trained)
