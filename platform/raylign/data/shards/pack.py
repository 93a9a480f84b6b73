"""Documents to packed token shards, on Ray Data.

    documents/part-*.parquet ─▶ tokenise ─▶ token files      Ray Data, one task a part
                                                │
                          global shuffle, pack ─┴─▶ shards   one process, one shard in memory

The order of documents is that of a hash of seed and document id, so it is a shuffle of the whole
corpus that no worker needs to know.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from raylign.config import UserError
from raylign.data.corpus.pipeline import stream
from raylign.data.documents import read_table, shuffle_key
from raylign.data.packing import SPLITS, ShardWriter, pack_chunks, write_index
from raylign.tracking import ProgressBoard

# Texts encoded at once: bounds what a task holds beside its documents.
ENCODE_TEXTS = 256


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
class Tokens:
    """All documents as tokens, memory-mapped, in shuffled order."""

    files: list[np.ndarray]
    """One array of concatenated documents a part."""
    places: np.ndarray
    """int64 [N, 3]: file, first token, tokens."""

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document."""
        file, start, count = self.places[number].tolist()
        return self.files[file][start : start + count]


def pack_corpus(
    files: Sequence[Path],
    vocabulary: Vocabulary,
    sequence_length: int,
    shard_rows: int,
    validation_share: float,
    seed: int,
    directory: Path,
    board: ProgressBoard,
) -> dict[str, Any]:
    """Write the shards of document `files` into `directory`; returns the numbers worth showing.

    Whole documents go to validation until they make up `validation_share` of the tokens, so no
    document is in both splits. Ray must be joined. Raises `UserError` when the corpus is too small
    for either split, or the tokenizer is not a fast one.
    """
    if not (vocabulary.directory / "tokenizer.json").is_file():
        raise UserError(
            f"tokenizer {vocabulary.directory} has no tokenizer.json; convert it to a fast one"
        )
    work = directory / "work"
    work.mkdir(parents=True)
    size = _tokenise(files, vocabulary, seed, work, board)
    tokens = _open(work, len(files))
    lengths = tokens.places[:, 2] + 1  # with <eos>
    total = int(lengths.sum())
    # The smallest number of documents that holds the share, but never all of them.
    held = int(np.searchsorted(np.cumsum(lengths), validation_share * total)) + 1
    held = held if validation_share > 0 else 0
    if len(lengths) <= held:
        raise UserError(
            f"prepare.validation_share={validation_share}: {len(lengths)} documents cannot be "
            "split; give more text, or 0"
        )
    writers = {split: ShardWriter(directory, split, vocabulary.size) for split in SPLITS}
    ranges = {"train": range(held, len(lengths)), "validation": range(held)}
    with board.bar("pack", total, "token") as bar:
        for split, writer in writers.items():
            documents: Iterator[np.ndarray] = map(tokens.document, ranges[split])
            for chunk in pack_chunks(
                documents, sequence_length, vocabulary.eos, vocabulary.pad, shard_rows
            ):
                writer.write(*chunk)
                bar.update(sum(w.tokens for w in writers.values()))
    write_index(directory, sequence_length, vocabulary.size, vocabulary.content, writers)
    shutil.rmtree(work)
    return {
        "train_rows": writers["train"].rows,
        "train_tokens": writers["train"].tokens,
        "validation_rows": writers["validation"].rows,
        "validation_tokens": writers["validation"].tokens,
        "bytes_per_token": round(size / max(1, total - len(lengths)), 3),
    }


def _tokenise(
    files: Sequence[Path], vocabulary: Vocabulary, seed: int, work: Path, board: ProgressBoard
) -> int:
    """Token files of all parts; returns how many bytes of text they hold."""
    parts = [{"number": number, "file": str(file)} for number, file in enumerate(files)]
    transform = partial(
        tokenise_parts,
        tokenizer=str(vocabulary.directory),
        content=vocabulary.content,
        wide=vocabulary.size > 65_535,
        seed=seed,
        work=str(work),
    )
    done = stream(parts, [transform], board, "tokenise", "part", "tokens")
    return sum(int(row["bytes"]) for row in done)


def tokenise_parts(
    parts: pa.Table, tokenizer: str, content: str, wide: bool, seed: int, work: str
) -> pa.Table:
    """Write tokens, lengths and shuffle keys of each document file in `parts` below `work`."""
    encoder = _load(tokenizer, content)
    results: dict[str, list[int]] = {"number": [], "tokens": [], "bytes": []}
    for part in parts.to_pylist():
        table = read_table(Path(part["file"]))
        texts = [text or "" for text in table["text"].to_pylist()]
        encoded: list[np.ndarray] = []
        for start in range(0, len(texts), ENCODE_TEXTS):
            batch = encoder.encode_batch_fast(
                texts[start : start + ENCODE_TEXTS], add_special_tokens=False
            )
            encoded += [np.array(e.ids, np.uint32 if wide else np.uint16) for e in batch]
        keys = [shuffle_key(doc_id, seed) for doc_id in table["doc_id"].to_pylist()]
        stem = Path(work, f"part-{part['number']:05d}")
        tokens = np.concatenate([np.empty(0, np.uint32 if wide else np.uint16), *encoded])
        np.save(f"{stem}.tokens.npy", tokens)
        np.save(f"{stem}.lengths.npy", np.array([len(e) for e in encoded], np.int64))
        np.save(f"{stem}.keys.npy", np.array(keys, np.uint64))
        results["number"].append(part["number"])
        results["tokens"].append(len(tokens))
        results["bytes"].append(sum(len(text.encode()) for text in texts))
    return pa.table(results)


@functools.lru_cache(maxsize=1)
def _load(directory: str, content: str) -> Tokenizer:
    """The tokenizer, once a worker process; `content` keeps a rewritten one from being mistaken."""
    encoder = Tokenizer.from_file(str(Path(directory, "tokenizer.json")))
    encoder.no_truncation()
    encoder.no_padding()
    # A document that spells out `<eos>` is text about it, not two documents.
    encoder.encode_special_tokens = True
    return encoder


def _open(work: Path, parts: int) -> Tokens:
    """Token files and the places of all documents, sorted by shuffle key."""
    files, places, keys = [], [np.empty((0, 3), np.int64)], [np.empty(0, np.uint64)]
    for number in range(parts):
        stem = work / f"part-{number:05d}"
        lengths = np.load(f"{stem}.lengths.npy")
        starts = np.cumsum(lengths) - lengths
        files.append(np.load(f"{stem}.tokens.npy", mmap_mode="r"))
        places.append(np.stack([np.full_like(lengths, number), starts, lengths], axis=1))
        keys.append(np.load(f"{stem}.keys.npy"))
    order = np.argsort(np.concatenate(keys), kind="stable")
    return Tokens(files, np.concatenate(places)[order])
