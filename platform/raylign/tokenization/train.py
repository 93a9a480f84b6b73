"""Training a tokenizer: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), chat template.

Bytes underneath mean that nothing is ever unknown; single digits mean that numbers of any length
are spelt in one way. The result is a plain transformers directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raylign.config import UserError

PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
SPECIAL = (PAD, EOS, USER, ASSISTANT)
"""Ids 0 to 3; never part of decoded text."""


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    tags: Sequence[str] = (),
    chat_template: Path | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocab_size` entries: special tokens, 256 bytes, merges, `tags`.

    `tags` are ordinary tokens: decoding shows them. The same texts in the same order give the same
    tokenizer. Raises `UserError` when the texts have too few distinct pieces for `vocab_size`, when
    `vocab_size` leaves no room for merges, or when the chat template cannot be read.
    """
    fixed = len(SPECIAL) + len(tags) + 256
    if vocab_size <= fixed:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size} leaves no room for merges: bytes, special tokens "
            f"and tags take {fixed}; raise it"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(tags),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_split_at_markup(texts, (*SPECIAL, *tags)), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size}: the corpus yields only {found} entries; "
            "lower tokenizer.vocab_size or give more text"
        )
    return _wrap(tokenizer, chat_template)


def _split_at_markup(texts: Iterable[str], markup: Sequence[str]) -> Iterator[str]:
    """The text between markup tokens, which are no material for merges."""
    pattern = re.compile("|".join(map(re.escape, markup)))
    for text in texts:
        yield from filter(None, pattern.split(text))


def _wrap(tokenizer: Tokenizer, chat_template: Path | None) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    template = chat_template or Path(__file__).with_name("chat_template.jinja")
    try:
        wrapped.chat_template = template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer.chat_template={template} cannot be read: {error}") from None
    return wrapped
