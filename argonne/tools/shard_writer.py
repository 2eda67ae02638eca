"""Write documents as parquet shards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from argonne.errors import DataError
from argonne.files import synchronize

MIB = 1 << 20
SURROGATES = re.compile("[\ud800-\udfff]")
"""What stands for bytes that are not UTF-8, and has no UTF-8 of its own."""


class ShardWriter:
    """Spreads documents over parquet shards; empty ones are left out.

    ``shard_mib`` and ``row_group_mib`` are MiB of text after which the next shard or row group begins.
    """

    def __init__(self, folder: Path, *, shard_mib: float, row_group_mib: float, compression: str) -> None:
        self._folder = folder
        self._shard_bytes = shard_mib * MIB
        self._group_bytes = row_group_mib * MIB
        self._compression = compression
        self._rows: list[bytes] = []
        self._rows_bytes = self._written_bytes = 0
        self._file: Any = None
        self.documents = self.total_bytes = self.shards = self.skipped = self.replaced = 0

    def add(self, text: str | None) -> None:
        if not text:
            return
        clean = SURROGATES.sub("\ufffd", text)
        self.replaced += clean != text
        row = clean.encode()
        self._rows.append(row)
        self._rows_bytes += len(row)
        self.documents += 1
        self.total_bytes += len(row)
        if self._rows_bytes >= self._group_bytes:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._file is None:
            path = self._folder / f"{self.shards // 100000:03d}_{self.shards % 100000:05d}.parquet"
            self._path = path
            self._file = pq.ParquetWriter(
                path,
                pa.schema([("text", pa.large_string())]),
                compression=self._compression,
                use_dictionary=False,
                write_page_checksum=True,
                write_statistics=False,  # of texts: whole documents in footers and page headers
                write_batch_size=64,
            )
            self.shards += 1
        array = pa.array(self._rows, pa.large_binary()).cast(pa.large_string())
        self._file.write_table(pa.table({"text": array}), row_group_size=len(self._rows))
        self._written_bytes += self._rows_bytes
        self._rows, self._rows_bytes = [], 0
        if self._written_bytes >= self._shard_bytes:
            self._close()

    def _close(self) -> None:
        self._file.close()
        self._file, self._written_bytes = None, 0
        synchronize(self._path)

    def finish(self) -> None:
        """Write what is left. Raises DataError where there was no text at all."""
        if self._rows:
            self._write_group()
        if self._file is not None:
            self._close()
        if self.documents == 0:
            raise DataError("the inputs hold no text: nothing was written")
