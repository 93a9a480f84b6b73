"""Personal data and secrets in text: counted in many documents, replaced in one.

The forms are conservative: what could as well be a version, a section number, a price or an ISBN
stays. A kernel finds the documents that can hold anything; only those meet regular expressions.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from raylign.config import PiiConfig
from raylign.data.quality.phrases import Automaton, compile_phrases, mark_spans
from raylign.data.words import kernel, text_buffers


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of personal data; its key in `PiiConfig` is its name in `KINDS`."""

    pattern: re.Pattern[str]
    accepts: Callable[[re.Match[str]], bool]
    """False for a match that is something else."""
    token: str
    fake: str


def _is_mail(match: re.Match[str]) -> bool:
    domain = match["domain"].lower()
    return domain not in ("example.com", "example.org", "example.net")


def _is_public_ip(match: re.Match[str]) -> bool:
    """Allocated to somebody: documentation, private, loopback and multicast ranges are nobody's."""
    text = match.group()
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 6:  # other "global" prefixes are not allocated, but look like C++ names
        return address.is_global and text[:4].isalnum() and "2" <= text[0] <= "3"
    if max(map(int, text.split("."))) < 10:  # 3.2.1.4 is a section
        return False
    return address.is_global and not address.is_multicast


def _is_phone(match: re.Match[str]) -> bool:
    text = match.group()
    if not text.startswith("+"):
        return True
    digits = sum(map(str.isdigit, text))
    marks = re.findall(r"[ .\-/()]+", text)
    if marks == ["."] or (not marks and digits < 10):  # a signed number
        return False
    return 8 <= digits <= 15


def _is_secret(match: re.Match[str]) -> bool:
    text = match.group()
    if not text.startswith("sk-"):
        return True
    return any(map(str.isdigit, text)) and any(map(str.isupper, text))


_CARD_LENGTHS = (
    (re.compile(r"4"), (13, 16, 19)),
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720|35"), (16,)),
    (re.compile(r"3[47]"), (15,)),
    (re.compile(r"30[0-5]|3[689]"), (14,)),
    (re.compile(r"6011|64[4-9]|65"), (16, 19)),
)


def _is_card(match: re.Match[str]) -> bool:
    """An issuer's prefix, a length that it uses, and Luhn's check digit (ISO/IEC 7812-1)."""
    digits = re.sub(r"\D", "", match.group())
    if not any(p.match(digits) and len(digits) in lengths for p, lengths in _CARD_LENGTHS):
        return False
    total = 0
    for place, digit in enumerate(map(int, reversed(digits))):
        doubled = digit * (1 + place % 2)
        total += doubled - 9 * (doubled > 9)
    return total % 10 == 0


_LETTER = "A-Za-z0-9\u00c0-\u024f"
_SECRETS = (
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",  # AWS
    r"\bgh[pousr]_[A-Za-z0-9]{36,255}\b",  # GitHub
    r"\bgithub_pat_[A-Za-z0-9_]{22,255}\b",
    r"\bxox[abeoprs]-[A-Za-z0-9-]{10,250}",  # Slack
    r"\bhooks\.slack\.com/services/[A-Za-z0-9]+/[A-Za-z0-9]+/[A-Za-z0-9]+",
    r"\bAIza[0-9A-Za-z_-]{35}(?![\w-])",  # Google
    r"(?<![\w-])sk-[A-Za-z0-9_-]{20,255}",  # OpenAI, Anthropic and those like them
    r"\b[sr]k_live_[0-9A-Za-z]{16,255}\b",  # Stripe
    r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",  # JSON web token
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?:(?!-----)[\s\S]){1,16384}-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    r"|(?:\s{1,2}[A-Za-z0-9+/=]{16,})+)",
)

KINDS: dict[str, Kind] = {
    "secrets": Kind(
        re.compile("|".join(_SECRETS)), _is_secret, "<SECRET>", "EXAMPLE-KEY-0000-0000-0000"
    ),
    "mails": Kind(
        re.compile(
            rf"(?<![{_LETTER}._%+@-])[{_LETTER}][{_LETTER}._%+-]{{0,63}}@"
            rf"(?P<domain>(?:[{_LETTER}](?:[{_LETTER}-]{{0,61}}[{_LETTER}])?\.)+[A-Za-z]{{2,24}})"
            rf"(?![{_LETTER}@-])"
        ),
        _is_mail,
        "<EMAIL>",
        "name@example.com",
    ),
    "ips": Kind(
        re.compile(
            r"(?<![\w.+-])(?<![Vv]ersion )(?<![Rr]elease )(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)"
            r"|(?<![\w:.])[0-9A-Fa-f]{4}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])"
        ),
        _is_public_ip,
        "<IP>",
        "192.0.2.1",
    ),
    "cards": Kind(
        re.compile(
            r"(?<![\w.+$€£-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?"
            r"|\d{4}([ -])\d{6}\2\d{4,5})(?![\w-]|[.,]\d)"
        ),
        _is_card,
        "<CARD>",
        "0000 0000 0000 0000",
    ),
    "phones": Kind(
        re.compile(
            r"(?<![\w.+/=-])\+[1-9]\d{0,2}(?:[ .\-/]{0,2}(?:\(\d{1,5}\)|\d{1,12})){1,6}"
            r"(?!\w|[.,]\d)"
            r"|(?<![\w.+$€£/-])(?:1[ .-])?(?:\([2-9]\d\d\) ?[2-9]\d\d[ .-]"
            r"|[2-9]\d\d([.-])[2-9]\d\d\1)\d{4}(?![\w-]|[.,]\d)"
        ),
        _is_phone,
        "<PHONE>",
        "555-0100",
    ),
}
"""In the order in which they are replaced: a secret may hold what looks like the others."""


def scrub(text: str, config: PiiConfig) -> tuple[str, dict[str, int]]:
    """The text with what `config` names replaced, and how often by kind (kinds of `KINDS`)."""
    replaced: dict[str, int] = {}
    wanted = [name for name in KINDS if getattr(config, name)]
    if not wanted:
        return text, replaced
    marks = int(find_candidates([text])[0])
    for name in wanted:
        if not marks & _BITS[name]:
            continue
        kind = KINDS[name]
        mark = kind.token if config.replacement == "token" else kind.fake
        text, count = _replace(text, kind, mark)
        if count:
            replaced[name] = count
    return text, replaced


def count(texts: pa.Array | pa.ChunkedArray | list[str]) -> dict[str, np.ndarray]:
    """How often each text (N of them) holds each kind of `KINDS`: int32 [N] by kind."""
    if isinstance(texts, list):
        texts = pa.array(texts, pa.large_string())
    marks = find_candidates(texts)
    found = {name: np.zeros(len(texts), np.int32) for name in KINDS}
    for row in np.flatnonzero(marks):
        text = texts[int(row)].as_py()
        for name, kind in KINDS.items():
            if int(marks[row]) & _BITS[name]:
                text, found[name][row] = _replace(text, kind, kind.token)
    return found


def _replace(text: str, kind: Kind, mark: str) -> tuple[str, int]:
    pieces, cursor, replaced = [], 0, 0
    for match in kind.pattern.finditer(text):
        if kind.accepts(match):
            pieces += [text[cursor : match.start()], mark]
            cursor = match.end()
            replaced += 1
    return ("".join([*pieces, text[cursor:]]), replaced) if replaced else (text, 0)


# Prefilter: which kinds a document can hold at all.

_BITS = {name: 1 << bit for bit, name in enumerate(KINDS)}
_SECRET, _MAIL, _IP, _CARD, _PHONE = _BITS.values()
_PREFIXES = (
    *("AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "xox", "AIza"),
    *("hooks.slack.com", "sk-", "sk_live_", "rk_live_", "eyJ", "PRIVATE KEY"),
)
_DIGIT, _HEX, _COLON, _DOT, _AT, _JOINS, _NAME = (1 << bit for bit in range(7))


def _classify_bytes() -> np.ndarray:
    roles = np.zeros(256, np.uint8)
    roles[ord("0") : ord("9") + 1] |= _DIGIT
    for byte in b"0123456789abcdefABCDEF":
        roles[byte] |= _HEX
    for byte in b" .-()/+":
        roles[byte] |= _JOINS
    for byte in range(256):
        if byte >= 128 or chr(byte).isalnum() or byte in b"._%+-":
            roles[byte] |= _NAME
    roles[ord(":")] |= _COLON
    roles[ord(".")] |= _DOT
    roles[ord("@")] |= _AT
    return roles


_ROLES = _classify_bytes()


@lru_cache(maxsize=1)
def _compile_prefixes() -> Automaton:
    return compile_phrases(_PREFIXES, fold=False)


def find_candidates(texts: pa.Array | pa.ChunkedArray | Sequence[str]) -> np.ndarray:
    """uint64 [N]: bits of the kinds (in the order of `KINDS`) that a text may hold."""
    data, offsets = text_buffers(list(texts) if isinstance(texts, tuple) else texts)
    bits = np.full(len(_PREFIXES), _SECRET, np.uint64)
    marks = mark_spans(data, offsets[:-1], offsets[1:], _compile_prefixes(), bits)
    _mark_numbers(data, offsets, _ROLES, marks)
    return marks


@kernel
def _mark_numbers(data, offsets, roles, marks):
    for document in range(len(offsets) - 1):
        first, stop = offsets[document], offsets[document + 1]
        mark = 0
        digits, dots, colons = 0, 0, 0
        for i in range(first, stop):
            role = roles[data[i]]
            if role & _DIGIT:
                digits += 1
                if digits >= 8:
                    mark |= _PHONE
                    if digits >= 13:
                        mark |= _CARD
                if dots >= 3:
                    mark |= _IP
            elif role & _JOINS:
                dots += (role & _DOT) != 0
            else:
                digits, dots = 0, 0
                inner = role & _AT and first < i < stop - 1
                if inner and roles[data[i - 1]] & roles[data[i + 1]] & _NAME:
                    mark |= _MAIL
            if role & _COLON:
                colons += 1
                if colons >= 2:
                    mark |= _IP
            elif not role & _HEX:
                colons = 0
        marks[document] |= np.uint64(mark)
