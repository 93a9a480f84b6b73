"""Documents to token files, one resumable part for each document file.

A part is four files: all tokens one after the other without a header, so that they can be written
as they come and mapped afterwards; and for each document its length, shuffle key and domain.
"""

from __future__ import annotations

import functools
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from raylign.data.corpus.parts import run_parts
from raylign.data.documents import read_batches, shuffle_key
from raylign.data.mixture import Documents
from raylign.data.packing import save_array, token_type
from raylign.tracking import ProgressBoard

WORK = ".work"
# Read and encoded at once: bounds what a task holds, whatever the size of its file.
READ_ROWS = 1024
ENCODE_TEXTS = 256
ENCODE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What packing needs to know of a tokenizer."""

    directory: Path
    """Holds `tokenizer.json`."""
    content: str
    """Its content hash."""
    size: int
    eos: int
    pad: int


@dataclass(frozen=True, slots=True, eq=False)
class Tokenised:
    """The token files of all parts and where each document is in them, N documents in order."""

    parts: tuple[str, ...]
    """Token files, relative to the directory."""
    files: np.ndarray
    """int32 [N]: number in `parts`."""
    starts: np.ndarray
    """int64 [N]: first token in that file."""
    documents: Documents
    text_bytes: int
    """UTF-8 bytes of all texts."""


def tokenise(
    files: Sequence[Path], vocabulary: Vocabulary, seed: int, directory: Path, board: ProgressBoard
) -> Tokenised:
    """Tokens of all documents of `files`, below `directory`/.work; Ray must be joined."""
    (directory / WORK).mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "number": number,
            "file": str(file),
            "size": file.stat().st_size,
            "tokenizer": str(vocabulary.directory),
            "content": vocabulary.content,
            "vocab_size": vocabulary.size,
            "seed": seed,
        }
        for number, file in enumerate(files)
    ]
    reports = run_parts(
        "tokenise", rows, tokenise_part, directory, board, size="tokens", stream=False
    )
    return _open(reports, directory)


def tokenise_part(row: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Write one part; the report says how many documents, tokens and bytes of text it has."""
    stem = f"{WORK}/part-{row['number']:05d}"
    lengths, keys, codes = array("q"), array("Q"), array("i")
    names: dict[str, int] = {}
    tokens = size = 0
    target = directory / f"{stem}.tokens"
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        columns = ["doc_id", "domain", "text"]
        for table in read_batches(Path(row["file"]), columns, READ_ROWS):
            keys.extend(shuffle_key(doc_id, row["seed"]) for doc_id in table["doc_id"].to_pylist())
            for domain in pc.fill_null(table["domain"], "documents").to_pylist():
                codes.append(names.setdefault(domain, len(names)))
            texts = pc.fill_null(table["text"], "")
            size += pc.sum(pc.binary_length(texts)).as_py() or 0
            for chunk in _split(texts):
                encoded = _encode(chunk, row, lengths)
                stream.write(encoded.data)
                tokens += len(encoded)
    os.replace(temporary, target)
    for name, values in (
        ("lengths", np.frombuffer(lengths, np.int64)),
        ("keys", np.frombuffer(keys, np.uint64)),
        ("domains", np.frombuffer(codes, np.int32)),
    ):
        save_array(directory / f"{stem}.{name}.npy", values)
    suffixes = ("tokens", "lengths.npy", "keys.npy", "domains.npy")
    return {
        "files": [f"{stem}.{suffix}" for suffix in suffixes],
        "documents": len(lengths),
        "tokens": tokens,
        "bytes": size,
        "domains": list(names),
    }


def _split(texts: pa.ChunkedArray) -> Iterator[list[str]]:
    """Lists of at most `ENCODE_TEXTS` texts and about `ENCODE_BYTES`, and one text at least."""
    sizes = np.asarray(pc.binary_length(texts), np.int64)
    start = 0
    while start < len(sizes):
        within = int(np.searchsorted(np.cumsum(sizes[start : start + ENCODE_TEXTS]), ENCODE_BYTES))
        stop = start + max(1, min(within, ENCODE_TEXTS))
        yield texts.slice(start, stop - start).to_pylist()
        start = stop


def _encode(texts: list[str], row: dict[str, Any], lengths: array[int]) -> np.ndarray:
    """Tokens of all texts, one after the other; appends the length of each."""
    encoder = _load(row["tokenizer"], row["content"])
    tokens = array("I")
    for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False):
        before = len(tokens)
        tokens.extend(encoding.ids)
        lengths.append(len(tokens) - before)
    return np.frombuffer(tokens, np.uint32).astype(token_type(row["vocab_size"]), copy=False)


@functools.lru_cache(maxsize=1)
def _load(directory: str, content: str) -> Tokenizer:
    """The tokenizer, once a worker process; `content` keeps a rewritten one from being mistaken."""
    encoder = Tokenizer.from_file(str(Path(directory, "tokenizer.json")))
    encoder.no_truncation()
    encoder.no_padding()
    # A document that spells out `<eos>` is text about it, not two documents.
    encoder.encode_special_tokens = True
    return encoder


def _open(reports: Sequence[dict[str, Any]], directory: Path) -> Tokenised:
    """What the parts hold, read by the driver; 40 bytes a document."""
    names = sorted({name for report in reports for name in report["domains"]})
    files, starts, lengths, keys, domains = [], [], [], [], []
    for number, report in enumerate(reports):
        _, *arrays = report["files"]  # the tokens stay where they are
        own, own_keys, codes = (np.load(directory / name) for name in arrays)
        files.append(np.full(len(own), number, np.int32))
        starts.append(np.cumsum(own) - own)
        lengths.append(own + 1)
        keys.append(own_keys)
        places = np.array([names.index(name) for name in report["domains"]], np.int32)
        domains.append(places[codes] if len(codes) else codes)
    return Tokenised(
        parts=tuple(next(iter(report["files"])) for report in reports),
        files=np.concatenate(files),
        starts=np.concatenate(starts),
        documents=Documents(
            np.concatenate(lengths), np.concatenate(keys), np.concatenate(domains), tuple(names)
        ),
        text_bytes=sum(int(report["bytes"]) for report in reports),
    )
