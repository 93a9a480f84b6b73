"""Documents to packed token shards.

    documents/part-*.parquet ─▶ token files ─▶ order of reading ─▶ shards
                               a task a file      the driver       a task for some shards

The driver holds a few numbers for each document and never a token. Which tokens a shard holds
follows from the cumulative lengths in the order of reading, so shards are packed in any order by
any number of workers, and come out the same.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from raylign.config import MixtureConfig, UserError
from raylign.data.corpus.parts import run_parts
from raylign.data.mixture import Reading, check_domains, mix, read_once
from raylign.data.packing import (
    SPLITS,
    ShardWriter,
    save_array,
    token_type,
    write_index,
    write_shard,
)
from raylign.data.shards.rows import Pieces, concatenate, fit, lay
from raylign.data.shards.tokenise import WORK, Tokenised, Vocabulary, tokenise
from raylign.run import hash_json, write_json
from raylign.tracking import ProgressBoard

MIXTURE = "mixture.json"
# Tokens that a task packs, in whole shards and one at least: enough to be worth a task.
PART_TOKENS = 1 << 22


def pack_corpus(
    files: Sequence[Path],
    vocabulary: Vocabulary,
    sequence_length: int,
    shard_rows: int,
    validation_share: float,
    seed: int,
    directory: Path,
    board: ProgressBoard,
    packing: str = "concatenate",
    mixture: MixtureConfig | None = None,
    part_tokens: int = PART_TOKENS,
) -> dict[str, Any]:
    """Write the shards of document `files` into `directory`; returns the numbers worth showing.

    Whole documents go to validation until they make up `validation_share` of the tokens, so no
    document is in both splits; with a `mixture` it is the share of every domain. `packing` is
    "concatenate" or "best_fit"; the latter fits the documents of one shard among each other, which
    may take a few rows more than `shard_rows`. Ray must be joined. Called again after it was
    killed, it continues; what it needs for that stays in `.work` and `.done`.

    Raises `UserError` when the corpus is too small for either split, the mixture does not fit the
    corpus, or the tokenizer is not a fast one.
    """
    if not (vocabulary.directory / "tokenizer.json").is_file():
        raise UserError(
            f"tokenizer {vocabulary.directory} has no tokenizer.json; convert it to a fast one"
        )
    if mixture is not None:
        check_domains(mixture, _list_domains(files))  # before hours of tokenising
    tokens = tokenise(files, vocabulary, seed, directory, board)
    if mixture is None:
        reading = read_once(tokens.documents, validation_share)
    else:
        reading = mix(tokens.documents, mixture, validation_share, seed)
    key = _write_plan(directory, tokens, reading, seed)
    settings = {
        "plan": key,
        "sequence_length": sequence_length,
        "vocab_size": vocabulary.size,
        "eos": vocabulary.eos,
        "pad": vocabulary.pad,
        "packing": packing,
    }
    rows = _plan_parts(
        reading,
        tokens.documents.lengths,
        shard_rows * sequence_length,
        part_tokens,
        settings,
    )
    work = partial(pack_part, parts=tokens.parts, names=tokens.documents.names)
    reports = run_parts("pack", rows, work, directory, board, size="tokens", stream=False)
    writers = {split: ShardWriter(directory, split, vocabulary.size) for split in SPLITS}
    for report in reports:
        for shard in report["shards"]:
            writers[shard["name"].partition("-")[0]].adopt(shard)
    write_json(directory / MIXTURE, {"seed": seed, **reading.report})
    write_index(directory, sequence_length, vocabulary.size, vocabulary.content, writers)
    return _summarise(writers, tokens, reading, sequence_length)


def pack_part(
    row: dict[str, Any], directory: Path, parts: tuple[str, ...], names: tuple[str, ...]
) -> dict[str, Any]:
    """Write the shards that `row` lists; runs in a worker. The report holds their entries."""
    length, vocab_size = row["sequence_length"], row["vocab_size"]
    files, starts, lengths, domains = (
        np.load(directory / WORK / f"{name}.npy", mmap_mode="r")
        for name in ("files", "starts", "lengths", "domains")
    )
    load = functools.lru_cache(maxsize=64)(
        lambda number: _map_tokens(directory / parts[number], vocab_size)
    )
    entries = []
    for shard in row["shards"]:
        split = shard["name"].partition("-")[0]
        order = np.load(directory / WORK / f"{split}.order.npy", mmap_mode="r")
        chosen = np.asarray(order[shard["low"] : shard["high"]])
        own = lengths[chosen]
        if row["packing"] == "best_fit":
            pieces = fit(own, chosen, length)
        else:
            ends = shard["offset"] + np.cumsum(own)
            pieces = concatenate(own, ends, shard["first"], shard["stop"], length)
        laid = lay(pieces, files[chosen], starts[chosen], load, length, row["eos"], row["pad"])
        entry = write_shard(directory, shard["name"], *laid, vocab_size)
        entry["domains"] = _count_domains(pieces, domains[chosen], names)
        entries.append(entry)
    return {
        "files": [name for entry in entries for name in entry["files"]],
        "shards": entries,
        "tokens": sum(entry["tokens"] for entry in entries),
    }


def _plan_parts(
    reading: Reading, lengths: np.ndarray, size: int, part_tokens: int, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Shards of `size` tokens, as many a part as make up `part_tokens`."""
    shards = [
        shard
        for split, order in (("train", reading.train), ("validation", reading.validation))
        for shard in divide_stream(split, lengths[order], size, settings["packing"])
    ]
    each = max(1, part_tokens // size)
    return [
        {"number": number, "shards": shards[start : start + each], **settings}
        for number, start in enumerate(range(0, len(shards), each))
    ]


def divide_stream(split: str, lengths: np.ndarray, size: int, packing: str) -> list[dict[str, Any]]:
    """The shards of a split, of `size` tokens of the stream each.

    `lengths` int64 [C] are those of the documents in the order of reading. A shard is made of the
    documents `low` to `high`, the first of which begins at token `offset` of the stream.
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    begins = ends - lengths
    shards: list[dict[str, Any]] = []
    for first in range(0, total, size):
        stop = min(first + size, total)
        if packing == "best_fit":  # the documents that begin in the range
            low, high = np.searchsorted(begins, (first, stop)).tolist()
        else:  # those that reach into it
            low = int(np.searchsorted(ends, first, side="right"))
            high = int(np.searchsorted(begins, stop))
        if low == high:  # a long document runs through the whole range
            continue
        shards.append(
            {
                "name": f"{split}-{len(shards):05d}",
                "low": low,
                "high": high,
                "offset": int(begins[low]),
                "first": first,
                "stop": stop,
            }
        )
    return shards


def _write_plan(directory: Path, tokens: Tokenised, reading: Reading, seed: int) -> str:
    """What the packing tasks read besides tokens; returns a hash of what it depends on."""
    work = directory / WORK
    arrays = {
        "files": tokens.files,
        "starts": tokens.starts,
        "lengths": tokens.documents.lengths,
        "domains": tokens.documents.domains,
        "train.order": reading.train,
        "validation.order": reading.validation,
    }
    for name, values in arrays.items():
        save_array(work / f"{name}.npy", values)
    sums = {
        name: hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
        for name, values in arrays.items()
    }
    return hash_json({"arrays": sums, "names": tokens.documents.names, "seed": seed})


def _map_tokens(file: Path, vocab_size: int) -> np.ndarray:
    kind = token_type(vocab_size)
    if not file.stat().st_size:  # cannot be mapped
        return np.empty(0, kind)
    return np.asarray(np.memmap(file, kind, mode="r"))


def _count_domains(pieces: Pieces, domains: np.ndarray, names: tuple[str, ...]) -> dict[str, int]:
    counts = np.zeros(len(names), np.int64)
    np.add.at(counts, domains[pieces.copies], pieces.counts + pieces.ends)
    return {names[d]: int(counts[d]) for d in np.flatnonzero(counts)}


def _list_domains(files: Sequence[Path]) -> set[str]:
    """The domains of all documents, without reading the documents."""
    names: set[str] = set()
    for file in files:
        reader = pq.ParquetFile(file)
        if "domain" not in reader.schema_arrow.names:
            names.add("documents")
            continue
        for batch in reader.iter_batches(1 << 16, columns=["domain"]):
            found = batch.column(0).unique().to_pylist()
            names |= {name or "documents" for name in found}
    return names


def _summarise(
    writers: dict[str, ShardWriter], tokens: Tokenised, reading: Reading, sequence_length: int
) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for split, writer in writers.items():
        summary[f"{split}_rows"] = writer.rows
        summary[f"{split}_tokens"] = writer.tokens
    places = sum(writer.rows for writer in writers.values()) * sequence_length
    real = sum(writer.tokens for writer in writers.values())
    count = len(tokens.documents.lengths)
    bodies = int(tokens.documents.lengths.sum()) - count
    return summary | {
        "padding_share": round(1 - real / max(1, places), 6),
        "bytes_per_token": round(tokens.text_bytes / max(1, bodies), 3),
        "domains": {
            name: {key: own[key] for key in ("wanted_share", "share", "tokens", "epochs")}
            for name, own in reading.report["domains"].items()
        },
    }
