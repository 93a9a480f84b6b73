"""Documents in files: which reader knows a kind, and how its files are cut into slices.

Files of lines are cut at fixed byte positions; a cut owns the lines that *begin* inside it. Parquet
is cut at row groups. A compressed file of lines cannot be entered in the middle and stays whole. So
does a web archive: the bytes of a record may look like the beginning of another.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from raylign.config import SourceConfig, UserError
from raylign.data.sources import columnar, lines, webarchive
from raylign.data.sources.cuts import Cut, Slice
from raylign.data.sources.rows import Row
from raylign.data.sources.storage import Stored, list_stored, open_stored

_JSONL = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".text", ".md")
_WARC = (".warc", ".warc.gz", ".warc.zst", ".warc.lz4", ".arc", ".arc.gz")
_WET = (".wet", ".wet.gz", ".warc.wet", ".warc.wet.gz", ".wet.zst", ".warc.wet.zst")
KINDS = {
    "jsonl": tuple(name + end for name in _JSONL for end in ("", *lines.COMPRESSED)),
    "parquet": (".parquet",),
    "text": tuple(name + end for name in _TEXT for end in ("", *lines.COMPRESSED)),
    "warc": _WARC,
    "wet": _WET,
}
"""Kind to the file names that are read from a directory; a file given by name, or matched by a
pattern, may be called anything."""


def cut(source: SourceConfig, key: str) -> Iterator[Cut]:
    """All parts of a file source. Raises `UserError` for what cannot be read."""
    assert source.path is not None
    stored = list_stored(source.path, KINDS[source.kind], key)
    if source.kind == "jsonl":
        lines.check_columns(source, stored, key)
    for file in stored:
        if source.kind == "parquet":
            bounds = columnar.cut_row_groups(file, source, key)
        else:
            whole = source.kind in ("warc", "wet") or file.name.endswith(lines.COMPRESSED)
            bounds = _cut_bytes(file, key, file.size if whole else source.part_bytes)
        for start, stop in bounds:
            yield Cut(file.path, file.name, start, stop, file.identity)


def _cut_bytes(file: Stored, key: str, size: int) -> list[tuple[int, int]]:
    try:
        open_stored(file.path).close()
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"{key}: {file.path} cannot be read ({reason}); correct it") from None
    return [(start, min(start + size, file.size)) for start in range(0, file.size, size or 1)]


def read(part: Slice) -> Iterator[Row | pa.Table]:
    """Records of one slice; what cannot be read is a rejected row, never lost."""
    if part.kind == "parquet":
        yield from columnar.read(part)
    elif part.kind in ("warc", "wet"):
        yield from webarchive.read(part)
    else:
        yield from lines.read(part)
