"""Examples token by token, as training sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from raylign.data.chat.encoding import Conversation, share_prefix
from raylign.data.instructions import Continuation, Dialogue, Message


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token of an example."""

    role: str
    """Whose message it belongs to, with what the template puts around it."""
    token_id: int
    text: str
    trained: bool


def list_tokens(
    example: Conversation, source: Dialogue | Continuation, tokenizer: PreTrainedTokenizerBase
) -> list[ShownToken]:
    """The tokens of an example that was made of `source`."""
    ids = example.token_ids.tolist()
    if isinstance(source, Continuation):
        roles = ["completion" if trained else "prompt" for trained in example.trained]
    else:
        roles = _name_roles(ids, source, tokenizer)
    return [
        ShownToken(role, token, _spell(token, tokenizer), trained)
        for role, token, trained in zip(roles, ids, example.trained.tolist(), strict=True)
    ]


def render_tokens(tokens: list[ShownToken]) -> Iterator[tuple[str, bool]]:
    """(line, whether its token is trained): place, role, id and text, with a sign if trained."""
    width = max(len(token.role) for token in tokens)
    for place, token in enumerate(tokens):
        sign = "train" if token.trained else ""
        line = f"{place:>6}  {sign:<5}  {token.role:<{width}}  {token.token_id:>7}  {token.text!r}"
        yield line, token.trained


def _name_roles(ids: list[int], source: Dialogue, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The role of each token: a message ends where its own rendering leaves the example.

    Where the template has rewritten it since, it ends where the conversation with another next
    message would.
    """
    messages = source.messages
    roles: list[str] = []
    for place, message in enumerate(messages):
        alone = _tokenise(messages[: place + 1], source, tokenizer)
        end = share_prefix(alone, ids)
        if end < min(len(alone), len(ids)) and place + 1 < len(messages):
            other = messages[place + 1] | {"content": "…", "tool_calls": None}
            varied = _tokenise([*messages[: place + 1], other], source, tokenizer)
            end = max(end, share_prefix(varied, ids))
        roles += [message["role"]] * (end - len(roles))
    return [*roles, *[messages[-1]["role"]] * (len(ids) - len(roles))]


def _tokenise(
    messages: list[Message], source: Dialogue, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Tokens of a conversation, none where the template refuses it."""
    kept = [{k: v for k, v in message.items() if v is not None} for message in messages]
    try:
        found = tokenizer.apply_chat_template(kept, tools=source.tools, return_dict=True)
    except (TemplateError, TypeError, KeyError, ValueError):
        return []
    return list(found["input_ids"])


def _spell(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token's text; where it is part of a character only, the vocabulary's name for it."""
    text = tokenizer.decode([token])
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text or not text else text
