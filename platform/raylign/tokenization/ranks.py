"""tiktoken's encodings as fast tokenizers, with the same id for every token.

tiktoken joins whichever neighbours make the token of lowest rank. As merges of a BPE that is: for
each token, in the order of ranks, all pairs of tokens that it consists of.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raylign.config import UserError

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD, _BLANKS = r"[^\r\n\p{L}\p{N}]?", r"\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",
    "cl100k": rf"(?i:{_CONTRACTIONS})|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
    + _BLANKS,
    "o200k": f"{_LEAD}{_UPPER}*{_LOWER}+(?i:{_CONTRACTIONS})?|"
    f"{_LEAD}{_UPPER}+{_LOWER}*(?i:{_CONTRACTIONS})?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|" + _BLANKS,
}
"""How text is cut into words before any merge."""
ENCODINGS = {
    "gpt2": "gpt2",
    "r50k_base": "gpt2",
    "p50k_base": "gpt2",
    "cl100k_base": "cl100k",
    "o200k_base": "o200k",
}
"""tiktoken's encodings that can be converted, and their patterns."""
END = "<|endoftext|>"
VERIFIED_BYTES = 4_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """An encoding as tiktoken stores it."""

    name: str
    pattern: str
    ranks: Mapping[bytes, int]
    special: Mapping[str, int]


def read_ranks(file: Path, pattern: str = "cl100k") -> Ranks:
    """A file of ranks: a line a token, base64 and rank; `<|endoftext|>` comes after all of them.

    Raises `UserError` when it is something else.
    """
    ranks: dict[bytes, int] = {}
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"tokenizer.load={file} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"tokenizer.load={file}: line {number} is not a base64 token and its rank; "
                "give a file of tiktoken's ranks"
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or len(set(ranks.values())) != len(ranks) or min(ranks.values()) < 0:
        reason = f"byte {missing[0]} has no rank" if missing else "a rank occurs twice"
        raise UserError(f"tokenizer.load={file}: {reason}; give a complete file of ranks")
    return Ranks(file.stem, PATTERNS[pattern], ranks, {END: max(ranks.values()) + 1})


def fetch_ranks(name: str) -> Ranks:
    """One of tiktoken's own encodings, from its cache or over the network.

    Raises `UserError` when there is none of that name, or it cannot be fetched.
    """
    if name not in ENCODINGS:
        raise UserError(
            f"tokenizer.load=tiktoken:{name}: not an encoding that is known here; "
            f"choose from {', '.join(ENCODINGS)}, or give a *.tiktoken file"
        )
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        reason = type(error).__name__
        raise UserError(
            f"tokenizer.load=tiktoken:{name}: its ranks cannot be fetched ({reason}); "
            "connect to the network once, set TIKTOKEN_CACHE_DIR to where they are, "
            "or give a *.tiktoken file"
        ) from None
    return Ranks(
        name, PATTERNS[ENCODINGS[name]], encoding._mergeable_ranks, encoding._special_tokens
    )


def convert(ranks: Ranks, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The same encoding as a fast tokenizer; ids without a token get one that is never used.

    Raises `UserError` when it spells one of `texts` (their first 4 MB are tried) in other ids than
    tiktoken does.
    """
    spell = spell_bytes()
    entries = {"".join(spell[b] for b in token): rank for token, rank in ranks.ranks.items()}
    entries |= ranks.special
    taken = set(entries.values())
    entries |= {f"<|unused_{i}|>": i for i in range(max(taken)) if i not in taken}
    merges: list[tuple[str, str]] = []
    for token, _ in sorted(ranks.ranks.items(), key=lambda item: item[1]):
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [pair for pair in halves if pair[0] in ranks.ranks and pair[1] in ranks.ranks]
        pairs.sort(key=lambda pair: (ranks.ranks[pair[0]], ranks.ranks[pair[1]]))
        merges += [("".join(spell[b] for b in a), "".join(spell[b] for b in c)) for a, c in pairs]
    tokenizer = Tokenizer(models.BPE(entries, merges, fuse_unk=False, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(ranks.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted(ranks.special, key=lambda token: ranks.special[token])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    _verify(ranks, tokenizer, texts)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END if END in special else None,
        extra_special_tokens=[token for token in special if token != END],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def _verify(ranks: Ranks, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    import tiktoken

    encoding = tiktoken.Encoding(
        ranks.name,
        pat_str=ranks.pattern,
        mergeable_ranks=dict(ranks.ranks),
        special_tokens=dict(ranks.special),
    )
    tokenizer.encode_special_tokens = True
    tried = 0
    for text in texts:
        if tokenizer.encode(text, add_special_tokens=False).ids != encoding.encode_ordinary(text):
            raise UserError(
                f"tokenizer.load: {ranks.name} cannot be converted exactly; tiktoken spells "
                f"{text[:40]!r}... in other ids"
            )
        tried += len(text)
        if tried > VERIFIED_BYTES:
            break
    tokenizer.encode_special_tokens = False


def spell_bytes() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    characters = {byte: chr(byte) for byte in shown}
    characters |= {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    return [characters[byte] for byte in range(256)]
