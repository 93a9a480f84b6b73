"""Knobs of sources: where documents come from, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from raylign.config.quality import QualityConfig
from raylign.config.section import Section

Kind = Literal[
    "pydoc",
    "docstrings",
    "textbook",
    "jsonl",
    "parquet",
    "text",
    "warc",
    "wet",
    "huggingface",
]
Extractor = Literal["resiliparse", "trafilatura", "none"]
Preset = Literal[
    "fineweb",
    "fineweb_edu",
    "the_pile",
    "the_stack",
    "c4",
    "wikipedia",
    "openwebtext",
    "dolma",
]


class SourceConfig(Section):
    """One place that documents come from."""

    kind: Kind
    """`pydoc` and `docstrings` read what ships with Python; `textbook` is generated; `warc` reads
    web archives (ARC too), `wet` their extracted text, `huggingface` a dataset of `datasets`."""
    path: str | Path | None = None
    """File, directory, glob or URL (`s3://...`, `gs://...`); for `huggingface` a directory or the
    name of a dataset on the hub."""
    preset: Preset | None = None
    """A published dataset whose columns are known; columns given here go before its own."""
    text_column: str | None = None
    """Column holding the text, `text` when nothing else is said; `a.b` is a field inside `a`."""
    id_column: str | None = None
    """Column holding the source's own id of a document; kept in `meta`."""
    url_column: str | None = None
    """Column holding the address a document was found at."""
    date_column: str | None = None
    """Column holding its date."""
    domain_column: str | None = None
    """Column holding its domain, what a mixture weighs."""
    meta_columns: tuple[str, ...] = ()
    """Further columns to keep, in `meta`."""
    domain: str | None = Field(default=None, min_length=1)
    """Domain of the documents that have none of their own; the source's label when not given."""
    html: bool = False
    """The text column holds HTML, from which the main text is extracted."""
    extractor: Extractor = "resiliparse"
    """Finds the main text of HTML: `resiliparse` is fast, `trafilatura` more careful, and `none`
    takes all the text there is."""
    max_record_bytes: int = Field(default=16 << 20, ge=1)
    """A larger record (line, page, cell) is rejected; bounds memory."""
    part_bytes: int = Field(default=32 << 20, ge=1)
    """Bytes of a file that one task reads, and that become one part of every stage; raise it to
    about a gigabyte for corpora of terabytes. Compressed files stay whole."""
    quality: QualityConfig | None = None
    """Thresholds for this source in place of `prepare.quality`."""
    name: str | None = None
    """Configuration of a `huggingface` dataset."""
    split: str = "train"
    """Split of a `huggingface` dataset."""
    revision: str | None = None
    """Revision of a dataset on the hub."""
    limit: int | None = Field(default=None, ge=1)
    """Take at most so many documents."""
