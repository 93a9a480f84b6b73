"""What a source held when it was read, told from a glance at it: terabytes are not hashed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import xxhash

from raylign.config import SourceConfig
from raylign.data.sources.files import KINDS
from raylign.data.sources.storage import Stored, list_stored, open_stored

WHOLE_BYTES = 64 << 20
GLANCE_BYTES = 64 << 10
GLANCED_FILES = 256


def identify_sources(sources: Sequence[SourceConfig]) -> dict[str, str]:
    """Path of every source that has one to 32 hexadecimal digits that change with its files.

    A source of at most `WHOLE_BYTES` is hashed whole, by names and contents. Of a larger one count
    the names, sizes and times of all files, and head and tail of `GLANCED_FILES` of them, evenly
    spread. A dataset on the hub is its name, split and revision. Raises `UserError`.
    """
    found: dict[str, str] = {}
    for number, source in enumerate(sources):
        if source.path is None:
            continue
        path = str(source.path)
        if source.kind == "huggingface":
            value = _identify_dataset(source, f"prepare.sources.{number}")
        else:
            stored = list_stored(path, KINDS[source.kind], f"prepare.sources.{number}")
            value = identify_files(stored)
        found[path] = xxhash.xxh3_128_hexdigest(f"{found.get(path, '')}{value}".encode())
    return found


def _identify_dataset(source: SourceConfig, key: str) -> str:
    path = str(source.path)
    options = f"{path}\0{source.name}\0{source.split}\0{source.revision}"
    if not Path(path).is_dir():
        return options
    return options + identify_files(list_stored(path, ("",), key))


def identify_files(stored: Sequence[Stored]) -> str:
    """32 hexadecimal digits, as `identify_sources` describes them."""
    state = xxhash.xxh3_128()
    whole = sum(file.size for file in stored) <= WHOLE_BYTES
    step = max(1, -(-len(stored) // GLANCED_FILES))
    for number, file in enumerate(stored):
        state.update(f"{file.name}\0{file.size}\0".encode())
        if whole:
            _hash_whole(state, file)
        else:
            state.update(file.identity.encode())
            if number % step == 0:
                _hash_ends(state, file)
    return state.hexdigest()


def _hash_whole(state: xxhash.xxh3_128, file: Stored) -> None:
    with open_stored(file.path) as stream:
        while piece := stream.read(1 << 20):
            state.update(piece)


def _hash_ends(state: xxhash.xxh3_128, file: Stored) -> None:
    with open_stored(file.path) as stream:
        state.update(stream.read(GLANCE_BYTES))
        if file.size > GLANCE_BYTES:
            stream.seek(max(GLANCE_BYTES, file.size - GLANCE_BYTES))
            state.update(stream.read(GLANCE_BYTES))
