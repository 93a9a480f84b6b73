"""What stands between two turns of the policy, in the words of its chat template.

The policy's own ids stay as they were sampled; only what follows its end of turn is rendered: the
observation as a message, and the opening of the next answer. It is read off a short conversation:
whatever the template adds to it behind the first answer.
"""

from __future__ import annotations

import threading
from itertools import chain
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from raylign.config import UserError
from raylign.data.chat.faults import list_special_tokens

# Of the conversation that is rendered; none of it can come out of a template by itself.
_ASKED, _SAID, _SEEN = "Raylign-asks-1", "Raylign-says-2", "Raylign-shows-3"
_NO_ROLE = "raylign-no-such-role"


class TurnRenderer:
    """Renders observations for one tokenizer.

    They are messages of the role `tool` where the chat template knows it, else of `user`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, place: str = "align.environment"
    ) -> None:
        """`place`: the section of the recipe that messages name. Raises `UserError` when the
        template knows neither role after an answer."""
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._special = tuple(list_special_tokens(tokenizer))
        known = [role for role in ("tool", "user") if self._knows(role)]
        if not known:
            raise UserError(
                f"{place}: the chat template of {tokenizer.name_or_path} has no form for "
                "what is said after an answer, neither as role tool nor as user; give the "
                "tokenizer another chat template"
            )
        self.role = known[0]
        """Of the messages that observations become."""
        ending, whole = self._render([_question(), _answer()]), self._follow(self.role)
        assert ending is not None and whole is not None
        self._closing = ending[ending.rindex(_SAID) + len(_SAID) :]
        self._before, _, self._after = whole[len(ending) :].partition(_SEEN)

    def render(self, observation: str, last: int) -> tuple[int, ...]:
        """Tokens between two turns, the first of which ended with the token `last`; where that is
        not the template's own end of a turn, this is put after it. Special tokens that an
        observation spells, which would forge or end a turn, are shown as plain text."""
        before, after = self._closing + self._before, self._after
        if any(token in observation for token in self._special):
            parts = [self._tokenise(before), self._tokenise(observation, plain=True)]
            tokens = tuple(chain(*parts, self._tokenise(after)))
        else:
            tokens = self._tokenise(before + observation + after)
        return tokens[1:] if tokens[:1] == (last,) else tokens

    def _tokenise(self, text: str, plain: bool = False) -> tuple[int, ...]:
        """`plain`: nothing in it is a special token."""
        options = {"add_special_tokens": False, "split_special_tokens": plain}
        with self._lock:  # the tokenizer remembers the option; episodes are answered in threads
            return tuple(self._tokenizer(text, **options)["input_ids"])

    def _knows(self, role: str) -> bool:
        """Whether a message of this role has a form of its own, and leaves what was before it."""
        whole, ending = self._follow(role), self._render([_question(), _answer()])
        if whole is None or ending is None or _SEEN not in whole:
            return False
        return whole.startswith(ending) and whole not in (
            self._follow("assistant"),
            self._follow(_NO_ROLE),
        )

    def _follow(self, role: str) -> str | None:
        """The conversation with an observation of this role, up to the next answer."""
        message = {"role": role, "content": _SEEN}
        return self._render([_question(), _answer(), message], add_generation_prompt=True)

    def _render(self, messages: list[dict[str, str]], **options: Any) -> str | None:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except (TemplateError, TypeError, KeyError, ValueError):  # a template's way of saying no
            return None
        return str(text)


def _question() -> dict[str, str]:
    return {"role": "user", "content": _ASKED}


def _answer() -> dict[str, str]:
    return {"role": "assistant", "content": _SAID}
