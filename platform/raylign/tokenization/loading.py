"""Tokenizers that exist already: a directory, the Hugging Face hub, tiktoken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from raylign.config import UserError
from raylign.config.tokenizer import TIKTOKEN, VocabularyConfig
from raylign.tokenization.ranks import convert, fetch_ranks, read_ranks
from raylign.tokenization.special import ASSISTANT, EOS, USER, read_template

FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "*.model",
    "*.jinja",
)
"""What a tokenizer consists of on the hub."""


def find_local(vocabulary: VocabularyConfig) -> Path | None:
    """The file or directory that `load` names; None for one of the hub, tiktoken, or training.

    Raises `UserError` for a path to nothing.
    """
    if vocabulary.load is None:
        return None
    name = vocabulary.load.removeprefix(TIKTOKEN)
    path = Path(name)
    if name != vocabulary.load and not name.endswith(".tiktoken"):
        return None
    if path.exists():
        return path
    if name.endswith((".tiktoken", ".json")) or name.startswith((".", "/", "~")):
        raise UserError(f"tokenizer.load={vocabulary.load}: no such file or directory")
    if name.count("/") > 1:
        raise UserError(f"tokenizer.load={name}: neither a directory nor a name of the hub")
    return None


def load(vocabulary: VocabularyConfig, sample: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer that `load` names, as it is: ids are exactly its own.

    One of tiktoken is converted and checked on `sample`. Raises `UserError` when it is not there,
    cannot be fetched, or has no fast form (`tokenizer.json`), which shards are made with.
    """
    assert vocabulary.load is not None
    path = find_local(vocabulary)
    if path is not None and path.is_file():
        if path.suffix != ".tiktoken":
            raise UserError(
                f"tokenizer.load={path}: give the directory of a tokenizer, or a *.tiktoken file"
            )
        return convert(read_ranks(path, vocabulary.pattern or "cl100k"), sample)
    if path is None and vocabulary.load.startswith(TIKTOKEN):
        return convert(fetch_ranks(vocabulary.load.removeprefix(TIKTOKEN)), sample)
    return _open(_download(vocabulary.load) if path is None else path, vocabulary.load)


def equip(
    tokenizer: PreTrainedTokenizerFast, tags: Sequence[str], chat_template: Path | None
) -> list[str]:
    """Give a loaded tokenizer what a stage needs, and return the entries that were appended.

    The chat template is the user's, else its own, else the plain one with its two special tokens;
    a tokenizer without an end gets `<eos>`. Tags that are no single entry are appended. Ids that
    exist stay.
    """
    before = len(tokenizer)
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": EOS})
    plain = chat_template is None and not tokenizer.chat_template
    if plain:
        marks = [AddedToken(mark, special=True, normalized=False) for mark in (USER, ASSISTANT)]
        tokenizer.add_special_tokens(
            {"extra_special_tokens": marks}, replace_extra_special_tokens=False
        )
    if plain or chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return tokenizer.convert_ids_to_tokens(list(range(before, len(tokenizer))))


def _download(name: str) -> Path:
    """The tokenizer's files of a hub repository, or those that were fetched before."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer.load={name}: no such directory, and it cannot be fetched from the Hugging "
            f"Face hub ({type(error).__name__}); correct the name, connect, or give a directory"
        ) from None


def _open(directory: Path, name: str) -> PreTrainedTokenizerFast:
    """Raises `UserError` unless the directory holds a tokenizer with a fast form."""
    try:
        stored = directory / "tokenizer.json"
        if stored.is_file() and "model" not in json.loads(stored.read_text(encoding="utf-8")):
            raise ValueError("its tokenizer.json names no model")
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"tokenizer.load={name}: holds no usable tokenizer ({first})") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer.load={name}: has no fast form (tokenizer.json), which shards are made "
            "with; choose another"
        )
    return tokenizer
