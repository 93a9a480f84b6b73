"""Tokens with a meaning of their own, and the transformers directory they are declared in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from raylign.config import UserError

PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
SPECIAL = (PAD, EOS, USER, ASSISTANT)
"""Ids 0 to 3 of every tokenizer that is trained here; never part of decoded text."""
UNKNOWN = "<unk>"
"""Id 4 of the kinds that can lack a character."""
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""Entries that spell one byte each, for the kinds that fall back on them."""


def split_at_markup(texts: Iterable[str], markup: Sequence[str]) -> Iterator[str]:
    """The text between markup tokens, which are no material for a vocabulary."""
    pattern = re.compile("|".join(map(re.escape, markup)))
    for text in texts:
        yield from filter(None, pattern.split(text))


def add_tags(tokenizer: Tokenizer, tags: Sequence[str]) -> None:
    """Append what is not an entry yet; decoding shows it."""
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])


def wrap(
    tokenizer: Tokenizer, chat_template: Path | None, unknown: str | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer trained here as transformers knows it, with its chat template."""
    named = {} if unknown is None else {"unk_token": unknown}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        padding_side="right",
        **named,
    )
    wrapped.chat_template = read_template(chat_template)
    return wrapped


def read_template(file: Path | None) -> str:
    """The user's chat template, or the plain one; raises `UserError` when it cannot be read."""
    file = file or Path(__file__).with_name("chat_template.jinja")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer.chat_template={file} cannot be read: {error}") from None


def require_room(size: int, fixed: int, what: str, key: str) -> None:
    """Raises `UserError` unless `size` entries hold more than the `fixed` ones."""
    if size <= fixed:
        raise UserError(
            f"{key}={size} leaves no room for {what}: bytes, special tokens "
            f"and tags take {fixed}; raise it"
        )


def require_size(found: int, size: int, key: str) -> None:
    """Raises `UserError` unless training found as many entries as were asked for."""
    if found != size:
        raise UserError(
            f"{key}={size}: the corpus yields only {found} entries; lower {key} or give more text"
        )
