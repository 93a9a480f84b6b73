"""Bad words in texts and blocked addresses, after lists that the user gives.

A list is a UTF-8 text file with one entry a line; what follows a `#` at the start of a line or
after a blank is a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from raylign.config import UserError
from raylign.data.quality.characters import ALNUM, LIMIT, classify_characters, read_character
from raylign.data.quality.phrases import Automaton, compile_phrases
from raylign.data.words import kernel, text_buffers

_COMMENT = re.compile(r"(?:^|\s)#.*")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Scripts that put no blanks between words: an entry in one of them matches anywhere."""


@dataclass(frozen=True, slots=True, eq=False)
class BadWords:
    """Entries in all their cases, as a machine."""

    automaton: Automaton
    anywhere: np.ndarray
    """bool [P]: the entry also matches inside a run of letters."""


def load_words(files: tuple[Path, ...], key: str = "prepare.signals.bad_words") -> BadWords:
    """Words and phrases of all files; kept for the next call while the files stay as they are.

    Raises `UserError` that names `key` for a file that is missing, unreadable or has no entry.
    """
    return _compile_words(files, key, _fingerprint(files, key))


@lru_cache(maxsize=4)
def _compile_words(files: tuple[Path, ...], key: str, _: tuple[tuple[int, int], ...]) -> BadWords:
    entries = [" ".join(entry.split()) for file in files for _, entry in _read_entries(file, key)]
    cases = {
        case: None
        for entry in entries
        for case in (entry, entry.lower(), entry.upper(), entry.capitalize(), entry.title())
    }
    anywhere = np.array([bool(_UNSPACED.search(case)) for case in cases])
    return BadWords(compile_phrases(list(cases)), anywhere)


def count_bad_words(texts: pa.Array | pa.ChunkedArray | list[str], words: BadWords) -> np.ndarray:
    """int32 [N]: occurrences of all entries, in any case, between characters that are no letters,
    digits or underscores (C4's condition; Raffel et al. 2020)."""
    data, offsets = text_buffers(texts)
    counts = np.zeros(len(offsets) - 1, np.int32)
    machine = words.automaton
    parts = (machine.classes, machine.moves, machine.first, machine.found, machine.shorter)
    width = len(machine.moves) // len(machine.found)
    entries = (machine.lengths, words.anywhere)
    _count(data, offsets, *parts, width, *entries, classify_characters(), counts)
    return counts


@kernel
def _count(
    data,
    offsets,
    classes,
    moves,
    first_end,
    found,
    shorter,
    width,
    lengths,
    anywhere,
    kinds,
    counts,
):
    for document in range(len(offsets) - 1):
        first, stop = offsets[document], offsets[document + 1]
        state = np.uint32(0)
        for i in range(first, stop):
            state = moves[state + classes[data[i]]]
            at = np.int64(state) // width if state >= first_end else 0
            while at > 0:
                phrase = found[at]
                if phrase >= 0:
                    start = i + 1 - lengths[phrase]
                    counts[document] += anywhere[phrase] or not (
                        _is_letter_before(data, first, start, kinds)
                        or _is_letter_at(data, i + 1, stop, kinds)
                    )
                at = shorter[at]


@kernel
def _is_letter_at(data, i, stop, characters):
    if i >= stop:
        return False
    code, _ = read_character(data, i)
    return code == 95 or (code < LIMIT and characters[code] & ALNUM != 0)


@kernel
def _is_letter_before(data, first, i, characters):
    if i <= first:
        return False
    i -= 1
    while data[i] & 0xC0 == 0x80:
        i -= 1
    return _is_letter_at(data, i, i + 1, characters)


@dataclass(frozen=True, slots=True, eq=False)
class BlockedUrls:
    """Hashes of the entries, sorted (8 bytes each: lists of millions fit)."""

    domains: np.ndarray
    """uint64: entries without a path"""
    addresses: np.ndarray
    """uint64: entries with one"""


def load_urls(files: tuple[Path, ...], key: str = "prepare.signals.blocked_urls") -> BlockedUrls:
    """Domains and addresses of all files; kept for the next call while the files stay as they are.

    An entry is a domain or an address, with or without scheme. Raises `UserError` that names `key`
    for a file that is missing, unreadable or has no entry, and for a line that is neither.
    """
    return _hash_urls(files, key, _fingerprint(files, key))


@lru_cache(maxsize=4)
def _hash_urls(files: tuple[Path, ...], key: str, _: tuple[tuple[int, int], ...]) -> BlockedUrls:
    domains, addresses = [], []
    for file in files:
        for line, entry in _read_entries(file, key):
            host, path = _split_url(entry)
            if not host or "." not in host or re.search(r"\s", entry):
                raise UserError(
                    f"{key}: {file}:{line}: {entry!r} is neither a domain nor an address; "
                    "correct the line"
                )
            if path:
                addresses.append(_hash(host.removeprefix("www.") + path))
            else:
                domains.append(_hash(host))
    return BlockedUrls(
        np.unique(np.array(domains, np.uint64)), np.unique(np.array(addresses, np.uint64))
    )


def match_urls(urls: Sequence[str | None], blocked: BlockedUrls) -> tuple[np.ndarray, np.ndarray]:
    """Whether the domain of each of N addresses is listed, and whether domain or address is: bool
    [N] each.

    `example.com` blocks itself and all domains below it; `example.com/a` blocks that address and
    all below it, with `www.` or without. A null is not blocked.
    """
    domains, addresses = np.zeros(len(urls), np.bool_), np.zeros(len(urls), np.bool_)
    for row, url in enumerate(urls):
        if not url:
            continue
        host, path = _split_url(url)
        parts = host.split(".")
        above = [".".join(parts[i:]) for i in range(len(parts))]
        domains[row] = _holds(blocked.domains, above)
        if path and len(blocked.addresses):
            host = host.removeprefix("www.")
            steps = path.split("/")
            below = ["/".join(steps[: i + 1]) for i in range(1, len(steps))]
            plain = path.partition("?")[0].rstrip("/")
            addresses[row] = _holds(blocked.addresses, [host + p for p in (*below, plain)])
    return domains, domains | addresses


def _split_url(url: str) -> tuple[str, str]:
    """Host in lower case without user and port; path and query, without slashes at the end."""
    rest = url.strip().partition("://")[2] or url.strip().removeprefix("//")
    rest = rest.partition("#")[0]
    cut = min((place for mark in "/?" if (place := rest.find(mark)) >= 0), default=len(rest))
    host = rest[:cut].rpartition("@")[2].partition(":")[0].lower().strip(".")
    return host, rest[cut:].rstrip("/")


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def _holds(hashes: np.ndarray, texts: list[str]) -> bool:
    wanted = np.array([_hash(text) for text in texts], np.uint64)
    places = np.searchsorted(hashes, wanted)
    return any(
        place < len(hashes) and hashes[place] == value
        for place, value in zip(places, wanted, strict=True)
    )


def _fingerprint(files: tuple[Path, ...], key: str) -> tuple[tuple[int, int], ...]:
    """Time and size of every file."""
    prints = []
    for file in files:
        if not file.is_file():
            raise UserError(f"{key}={file}: no such file; correct the path")
        stat = file.stat()
        prints.append((stat.st_mtime_ns, stat.st_size))
    return tuple(prints)


def _read_entries(file: Path, key: str) -> Iterator[tuple[int, str]]:
    """Line number and entry of every line that has one."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {file} cannot be read as UTF-8 text ({error})") from None
    entries = [
        (n, entry) for n, line in enumerate(lines, 1) if (entry := _COMMENT.sub("", line).strip())
    ]
    if not entries:
        raise UserError(f"{key}: {file} has no entry; remove it from the key or fill it")
    yield from entries
