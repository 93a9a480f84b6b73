"""Training a tokenizer: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), chat template.

Bytes underneath mean that nothing is ever unknown; single digits mean that numbers of any length
are spelt in one way. The result is a plain transformers directory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raylign.config.tokenizer import VocabularyConfig
from raylign.tokenization.lexicon import train_characters, train_words
from raylign.tokenization.special import (
    SPECIAL,
    add_tags,
    require_room,
    require_size,
    split_at_markup,
    wrap,
)
from raylign.tokenization.unigram import train_unigram

DEFAULT_SIZE = 1024


def train(
    texts: Iterable[str],
    vocabulary: VocabularyConfig,
    size: int | None = None,
    tags: Sequence[str] = (),
    chat_template: Path | None = None,
    key: str = "tokenizer.vocab_size",
) -> PreTrainedTokenizerFast:
    """A tokenizer of the kind that `vocabulary` names, with `size` entries in place of its own.

    The same texts in the same order give the same tokenizer. Raises `UserError` naming `key` when
    the size does not fit the kind or the texts, or when the chat template cannot be read.
    """
    size = size or vocabulary.vocab_size
    digits = vocabulary.digits == "single"
    if vocabulary.kind == "char":
        return train_characters(
            texts,
            size,
            tags,
            chat_template,
            vocabulary.min_frequency,
            vocabulary.falls_back,
            key,
        )
    if vocabulary.kind == "word":
        return train_words(
            texts,
            size or DEFAULT_SIZE,
            tags,
            chat_template,
            vocabulary.min_frequency,
            digits,
            key,
        )
    if vocabulary.kind == "unigram":
        return train_unigram(
            texts, size or DEFAULT_SIZE, tags, chat_template, vocabulary.falls_back, digits, key
        )
    return train_bpe(
        texts, size or DEFAULT_SIZE, tags, chat_template, vocabulary.min_frequency, digits, key
    )


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    tags: Sequence[str] = (),
    chat_template: Path | None = None,
    min_frequency: int = 1,
    single_digits: bool = True,
    key: str = "tokenizer.vocab_size",
) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocab_size` entries: special tokens, 256 bytes, merges, `tags`.

    `tags` are ordinary tokens: decoding shows them. The same texts in the same order give the same
    tokenizer. Raises `UserError` when the texts have too few distinct pieces for `vocab_size`, when
    `vocab_size` leaves no room for merges, or when the chat template cannot be read.
    """
    require_room(vocab_size, len(SPECIAL) + len(tags) + 256, "merges", key)
    tokenizer = Tokenizer(models.BPE())
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytewise])
        if single_digits
        else bytewise
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(tags),
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(split_at_markup(texts, (*SPECIAL, *tags)), trainer)
    add_tags(tokenizer, tags)
    require_size(tokenizer.get_vocab_size(), vocab_size, key)
    return wrap(tokenizer, chat_template)
