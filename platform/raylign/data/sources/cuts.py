"""Parts of a source: where one begins and ends, and all that reading it takes."""

from __future__ import annotations

from dataclasses import dataclass

from raylign.data.sources.columns import Columns


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of a file: bytes, or row groups, `start`..`stop`."""

    path: str
    name: str
    start: int
    stop: int
    identity: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of one source; rows of this are what Ray Data distributes.

    Every value is plain JSON, and a slice made of what JSON gives back reads the same.
    """

    index: int
    """Place among all slices."""
    kind: str
    source: str
    """Label of the source in every table and report."""
    domain: str
    """Domain of documents without one of their own."""
    path: str
    """File (absolute, or a URL), "" for what is built in, or the name of a hub's dataset."""
    name: str
    """The file's path below its source, or ""."""
    start: int
    """First byte, row group, page, module or shard."""
    stop: int
    """Where the next slice begins."""
    identity: str
    """Changes with the file, so that what was made of an older one is made again."""
    text_column: str
    id_column: str
    url_column: str
    date_column: str
    domain_column: str
    meta_columns: tuple[str, ...]
    html: bool
    extractor: str
    max_record_bytes: int
    limit: int
    """Documents after which the slice may stop; 0 for none."""
    options: tuple[str, ...] = ()
    """Configuration, split and revision of a `huggingface` dataset."""

    @property
    def columns(self) -> Columns:
        """What the columns hold."""
        return Columns(
            self.text_column,
            self.id_column,
            self.url_column,
            self.date_column,
            self.domain_column,
            tuple(self.meta_columns),
        )
