"""Vocabularies that are lists: whole words, and single characters.

Both spell text without loss as long as they know all of it, blanks included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raylign.config import UserError
from raylign.tokenization.special import (
    BYTES,
    SPECIAL,
    UNKNOWN,
    add_tags,
    require_room,
    require_size,
    split_at_markup,
    wrap,
)

WORD = r"\s+|\w+|[^\w\s]+"
"""Every character belongs to a run of blanks, of letters and digits, or of signs."""


def train_words(
    texts: Iterable[str],
    vocab_size: int,
    tags: Sequence[str] = (),
    chat_template: Path | None = None,
    min_frequency: int = 1,
    single_digits: bool = True,
    key: str = "tokenizer.vocab_size",
) -> PreTrainedTokenizerFast:
    """The most frequent words, runs of blanks and of signs; all others are `<unk>`.

    Equally frequent words count in alphabetical order. Raises `UserError` when `vocab_size` does
    not fit the texts.
    """
    special = (*SPECIAL, UNKNOWN)
    require_room(vocab_size, len(special) + len(tags), "words", key)
    tokenizer = build_word_speller({}, UNKNOWN, single_digits)
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size - len(tags),
        min_frequency=min_frequency,
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator(split_at_markup(texts, (*special, *tags)), trainer)
    add_tags(tokenizer, tags)
    require_size(tokenizer.get_vocab_size(), vocab_size, key)
    return wrap(tokenizer, chat_template, UNKNOWN)


def build_word_speller(
    vocabulary: dict[str, int], unknown: str, single_digits: bool = False
) -> Tokenizer:
    """A tokenizer of the words in `vocabulary` (word to id), before any special tokens."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    words = pre_tokenizers.Split(Regex(WORD), "isolated")
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, digits] if single_digits else [words])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def train_characters(
    texts: Iterable[str],
    vocab_size: int | None = None,
    tags: Sequence[str] = (),
    chat_template: Path | None = None,
    min_frequency: int = 1,
    byte_fallback: bool = False,
    key: str = "tokenizer.vocab_size",
) -> PreTrainedTokenizerFast:
    """All characters of the texts, or the most frequent that fit into `vocab_size` entries.

    Ids follow the special tokens (and bytes) in the order of code points. What is missing is
    `<unk>`, or with `byte_fallback` spelt in bytes. Raises `UserError` when `vocab_size` does not
    fit the texts, or they are empty.
    """
    special = (*SPECIAL, UNKNOWN)
    fixed = [*special, *(BYTES if byte_fallback else ())]
    if vocab_size is not None:
        require_room(vocab_size, len(fixed) + len(tags), "characters", key)
    counts: Counter[str] = Counter()
    for text in split_at_markup(texts, (*special, *tags)):
        counts.update(text)
    ranked = [c for c in rank(counts) if counts[c] >= min_frequency]
    room = len(ranked) if vocab_size is None else vocab_size - len(fixed) - len(tags)
    if not ranked:
        raise UserError(
            "tokenizer: no character of the corpus is frequent enough for an entry; "
            "give more text or lower tokenizer.min_frequency"
        )
    if vocab_size is not None and len(ranked) < room:
        require_size(vocab_size - room + len(ranked), vocab_size, key)
    tokenizer = build_character_speller([*fixed, *sorted(ranked[:room])], UNKNOWN, byte_fallback)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    add_tags(tokenizer, tags)
    return wrap(tokenizer, chat_template, UNKNOWN)


def build_character_speller(
    entries: Sequence[str], unknown: str, byte_fallback: bool = False
) -> Tokenizer:
    """A tokenizer of single characters; each entry's id is its place.

    It is a BPE without merges, which is the one model that looks characters up one by one.
    """
    places = {entry: place for place, entry in enumerate(entries)}
    tokenizer = Tokenizer(
        models.BPE(places, [], unk_token=unknown, fuse_unk=False, byte_fallback=byte_fallback)
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def rank(counts: Counter[str]) -> list[str]:
    """The most frequent first; equally frequent ones in the order of code points."""
    return sorted(counts, key=lambda piece: (-counts[piece], piece))
