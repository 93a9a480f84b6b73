"""Parquet files that are whole or absent, and equal bytes for equal tables."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 65_536
_LOW_CARDINALITY = ("source", "domain", "stage", "reason", "language", "task")


def write_parquet(table: pa.Table, file: Path) -> None:
    """Write a table so that it appears whole."""
    with TableWriter(file, table.schema) as writer:
        writer.write(table)


class TableWriter:
    """Writes tables one after the other, a row group each, into a file that appears at the end.

    Leaving the block by an exception leaves no file. Memory is that of one table.
    """

    def __init__(self, file: Path, schema: pa.Schema) -> None:
        self._file = file
        self._temporary = file.with_name(f".{file.name}.{os.getpid()}")
        self._schema = schema
        self.rows = 0

    def __enter__(self) -> TableWriter:
        self._writer = pq.ParquetWriter(
            self._temporary,
            self._schema,
            compression="zstd",
            compression_level=1,
            version="2.6",
            use_dictionary=[n for n in _LOW_CARDINALITY if n in self._schema.names],
            store_schema=True,
        )
        return self

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        if table.num_rows:
            self._writer.write_table(table, row_group_size=ROW_GROUP)
            self.rows += table.num_rows

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._writer.close()
            if kind is None:
                os.replace(self._temporary, self._file)
        finally:
            self._temporary.unlink(missing_ok=True)
