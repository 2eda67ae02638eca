"""Rows of a parquet file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from argonne.data.columns import check_column, to_rows
from argonne.data.remote import ShardPath
from argonne.data.texts import BATCH_BYTES, ShardError, TextBatch, rows_per_batch

SIGNATURE_BYTES = 28
"""Nonce and tag behind the metadata of a readable footer in a file with encrypted columns."""


class ParquetReader:
    """Rows of a parquet file, a row group at a time, page checksums verified where the file has them."""

    def __init__(self, path: ShardPath, column: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        # Buffered and unmapped, a column chunk is read page by page: memory does not grow with the row group.
        self._file = pq.ParquetFile(
            path if isinstance(path, Path) else path.open(),
            buffer_size=BATCH_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )
        self._column = column
        self._metadata = self._file.metadata
        schema = self._file.schema_arrow
        field = check_column(schema, column)
        # By number: a column "a.b" and the field b of a struct "a" have the same path in the file.
        self._column_index = sum(leaves(schema.field(index).type) for index in range(field))
        self._all_null = pa.types.is_null(schema.field(field).type)
        if has_encrypted_columns(path, self._metadata) and not is_readable(path, self._column_index):
            raise ShardError(f"column {str(column)!r} is encrypted: give a decrypted copy")
        self.group_rows = tuple(
            self._metadata.row_group(g).num_rows for g in range(self._metadata.num_row_groups)
        )

    def __enter__(self) -> ParquetReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def null_rows(self) -> int:
        """Null rows by the footer's statistics (0 where a row group has none)."""
        if self._all_null:
            return sum(self.group_rows)
        total = 0
        for group in range(len(self.group_rows)):
            statistics = self._metadata.row_group(group).column(self._column_index).statistics
            total += statistics.null_count if statistics is not None and statistics.has_null_count else 0
        return total

    def text_bytes(self) -> int:
        """Size of the text column before compression."""
        groups = range(len(self.group_rows))
        return sum(
            self._metadata.row_group(g).column(self._column_index).total_uncompressed_size for g in groups
        )

    def token_count(self) -> int:
        """Values in a column of lists, and its empty and null lists, a value each."""
        chunks = (self._metadata.row_group(g).column(self._column_index) for g in range(len(self.group_rows)))
        return sum(chunk.num_values for chunk in chunks)

    def batches(self, group: int) -> Iterator[TextBatch]:
        """The rows of a row group in order. Raises pa.ArrowException or OSError where they cannot be read."""
        chunk = self._metadata.row_group(group).column(self._column_index)
        batch_rows = rows_per_batch(self.group_rows[group], chunk.total_uncompressed_size)
        row = sum(self.group_rows[:group])
        for batch in self._file.reader.iter_batches(
            batch_rows, [group], column_indices=[self._column_index], use_threads=False
        ):
            yield to_rows(batch.column(0), self._column, row)
            row += batch.num_rows


def leaves(value_type: Any) -> int:
    """Columns of a parquet file in which a field of this type is stored."""
    import pyarrow as pa

    if isinstance(value_type, pa.BaseExtensionType):
        return leaves(value_type.storage_type)
    if pa.types.is_nested(value_type) and value_type.num_fields:
        return sum(leaves(value_type.field(index).type) for index in range(value_type.num_fields))
    return 1


def has_encrypted_columns(path: ShardPath, metadata: Any) -> bool:
    """Whether columns are encrypted although the footer is not: then a signature follows the metadata."""
    with path.open("rb") as file:
        file.seek(-8, 2)
        footer_bytes = int.from_bytes(file.read(4), "little")
    return bool(footer_bytes - metadata.serialized_size == SIGNATURE_BYTES)


_READ_COLUMN = """
import resource, sys
import pyarrow.parquet as pq
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an abort is expected; it must not leave a core file behind
metadata = pq.ParquetFile(sys.argv[1]).metadata
for group in range(metadata.num_row_groups):
    metadata.row_group(group).column(int(sys.argv[2])).statistics
"""


def is_readable(path: ShardPath, column_index: int) -> bool:
    """Whether a column's metadata can be read; pyarrow aborts its process where not, so a child tries it."""
    if not isinstance(path, Path):
        return False  # a child of its own would read it over the network again
    command = [sys.executable, "-c", _READ_COLUMN, str(path), str(column_index)]
    return subprocess.run(command, capture_output=True).returncode == 0
