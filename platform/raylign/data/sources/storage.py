"""Where files lie: a local path, a glob, or the URL of an object store, all read the same way.

Local files are opened by Python itself; everything with `://` in it goes through the file systems
of pyarrow (`s3://`, `gs://`, `hdfs://`, `abfs://`, `file://`), whose credentials come from the
environment as theirs do.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs

from raylign.config import UserError
from raylign.data.extraction.text import is_encodable

BUFFER_BYTES = 1 << 20
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Stored:
    """A file as a listing shows it."""

    path: str
    """Absolute path or URL; what `open_stored` takes."""
    name: str
    """Its path below what the source names, or the bare file name."""
    size: int
    modified: int
    """Nanoseconds since the epoch; 0 where the store does not say."""

    @property
    def identity(self) -> str:
        """Changes when the file is written again."""
        return f"{self.size}-{self.modified}"


def is_url(path: str | Path) -> bool:
    """Whether a file system of pyarrow is asked, not the local disk."""
    return "://" in str(path)


def list_stored(path: str | Path, suffixes: tuple[str, ...], key: str) -> list[Stored]:
    """Files of a path, sorted by name: the file itself, a directory's files that end in one of
    `suffixes`, or all that a glob (`*`, `?`, `[...]`, `**`) matches.

    Raises `UserError` naming `key` for a path that does not exist, holds none, or cannot be listed.
    """
    given = str(path)
    try:
        return _list(given, suffixes, key)
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{key}.path={given}: cannot be listed ({reason}); correct the path, or what the file "
            "system needs to be reached"
        ) from None


def _list(given: str, suffixes: tuple[str, ...], key: str) -> list[Stored]:
    base, pattern = _split_glob(given)
    system, root, url = _locate(base)
    info = system.get_file_info(root)
    if info.type == fs.FileType.File and pattern is None:
        name, place = root.rpartition("/")[2], base if is_url(base) else url
        return [Stored(place, name, info.size or 0, info.mtime_ns or 0)]
    if info.type == fs.FileType.NotFound:
        raise UserError(f"{key}.path={given}: no such file or directory; correct the path")
    if info.type != fs.FileType.Directory:
        raise UserError(f"{key}.path={given}: is no file or directory; correct the path")
    found = []
    matcher = None if pattern is None else re.compile(_translate(pattern))
    for path, status, size, modified in _list_below(system, root, pattern):
        name = path[len(root.rstrip("/")) + 1 :]
        if not (matcher.fullmatch(name) if matcher else name.endswith(suffixes)):
            continue
        # Not to be passed over in silence, nor to wait for.
        if status:
            raise UserError(f"{key}.path={given}: {name!r} {status}; remove or replace it")
        place = _join(base, name) if is_url(base) else f"{url}/{name}"
        found.append(Stored(place, name, size, modified))
    if not found and matcher:
        raise UserError(f"{key}.path={given}: matches no file; correct the pattern")
    if not found:
        plain = [s for s in suffixes if not s.startswith(tuple(f"{t}." for t in suffixes))]
        packed = " (compressed or not)" if len(plain) < len(suffixes) else ""
        raise UserError(
            f"{key}.path={given}: holds no {' or '.join(plain)}{packed} file; correct path or kind"
        )
    return sorted(found, key=lambda file: file.name)


def _list_below(
    system: fs.FileSystem, root: str, pattern: str | None
) -> Iterator[tuple[str, str, int, int]]:
    """(path, why it cannot be read or "", size, nanoseconds) of all that is no directory; of the
    local disk only as deep as the pattern can reach."""
    if isinstance(system, fs.LocalFileSystem):
        levels = pattern.count("/") + 1 if pattern and "**" not in pattern else math.inf
        for path in _walk(root, levels, frozenset()):
            yield path, *_look_up(path)
        return
    for entry in system.get_file_info(fs.FileSelector(root, recursive=True)):
        if entry.type == fs.FileType.File:
            yield entry.path, "", entry.size or 0, entry.mtime_ns or 0


def _walk(folder: str, levels: float, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Paths below a directory that are none; links are followed, but not in circles."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry.path
            elif levels > 1:
                yield from _walk(entry.path, levels - 1, above | {here})


def _look_up(path: str) -> tuple[str, int, int]:
    """What `_list_below` says of a local file."""
    try:
        status = os.stat(path)
    except OSError as error:
        return f"cannot be reached ({error.strerror})", 0, 0
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file", 0, 0
    if not is_encodable(path):
        return "has a name that is not UTF-8", 0, 0
    return "", status.st_size, status.st_mtime_ns


def _join(url: str, name: str) -> str:
    """The URL of a file below a URL, whose query stays at the end."""
    place, mark, query = url.partition("?")
    return f"{place.rstrip('/')}/{quote(name)}{mark}{query}"


def _split_glob(given: str) -> tuple[str, str | None]:
    """(what stands before the first wild component, the pattern below it or None)."""
    if not _WILD.search(given) or (not is_url(given) and Path(given).exists()):
        return given, None
    if is_url(given) and "=" in given.partition("?")[2]:
        return given, None  # the query of a URL, as in s3://bucket/dir?region=eu-west-1
    parts = given.split("/")
    wild = next(number for number, part in enumerate(parts) if _WILD.search(part))
    base = "/".join(parts[:wild])
    return base or ("/" if given.startswith("/") else "."), "/".join(parts[wild:])


def _translate(pattern: str) -> str:
    """A glob as a regular expression; `*` stays inside a directory and `**/` crosses them."""
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**/", i):
            out, i = out + "(?:.*/)?", i + 3
        elif pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        elif pattern[i] == "*":
            out, i = out + "[^/]*", i + 1
        elif pattern[i] == "?":
            out, i = out + "[^/]", i + 1
        elif pattern[i] == "[" and "]" in pattern[i + 2 :]:
            stop = pattern.index("]", i + 2)
            inner = pattern[i + 1 : stop].replace("\\", "\\\\").replace("[", "\\[")
            out += f"[^{inner[1:]}]" if inner.startswith("!") else f"[{inner}]"
            i = stop + 1
        else:
            out, i = out + re.escape(pattern[i]), i + 1
    return out


def _locate(base: str) -> tuple[fs.FileSystem, str, str]:
    """(file system, path inside it, the same as it is written before a file's name)."""
    if is_url(base):
        system, root = fs.FileSystem.from_uri(base)
        return system, root, root
    root = Path(base).resolve().as_posix()
    return fs.LocalFileSystem(), root, "" if root == "/" else root


def open_stored(path: str) -> IO[bytes]:
    """A buffered, seekable stream of a file's bytes. Raises `OSError`."""
    if not is_url(path):
        return Path(path).open("rb", buffering=BUFFER_BYTES)
    return cast(IO[bytes], io.BufferedReader(open_arrow(path), BUFFER_BYTES))


def open_arrow(path: str) -> pa.NativeFile:
    """The same as a file of pyarrow, for its Parquet reader."""
    if not is_url(path):
        return pa.OSFile(path)
    system, place = fs.FileSystem.from_uri(path)
    return system.open_input_file(place)
