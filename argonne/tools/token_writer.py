"""Write token ids as shards: parquet with a list column, or flat files in the layout of llm.c."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from argonne.data.flat_tokens import FLAT_SUFFIX, HEADER_BYTES, flat_header
from argonne.files import synchronize

TOKEN_COLUMN = "input_ids"
MIB = 1 << 20


class TokenShard(Protocol):
    """One shard that is being written."""

    size: int
    """Bytes of ids so far."""

    def add(self, ids: np.ndarray) -> None: ...

    def close(self) -> None: ...


def id_type(vocab_size: int) -> np.dtype[Any]:
    """The narrowest of the types of a flat file that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class FlatShard:
    """A flat file; its header, which holds the number of tokens, is written last."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype = path, dtype
        self._file = open(path, "wb")
        self._file.write(bytes(HEADER_BYTES))
        self.size = 0

    def add(self, ids: np.ndarray) -> None:
        """One document's ids."""
        self._file.write(ids.astype(self._dtype).tobytes())
        self.size += len(ids) * self._dtype.itemsize

    def close(self) -> None:
        """Complete the file and put it on the disk."""
        self._file.seek(0)
        self._file.write(flat_header(self.size // self._dtype.itemsize))
        self._file.close()
        synchronize(self._path)


class ListShard:
    """A parquet file with a document's ids in each row, page checksums, and row groups of ``group_bytes``."""

    def __init__(self, path: Path, dtype: np.dtype[Any], group_bytes: float, compression: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path, self._dtype, self._group_bytes = path, dtype, group_bytes
        self._type = pa.large_list(pa.uint16() if dtype.itemsize == 2 else pa.uint32())
        self._file = pq.ParquetWriter(
            path,
            pa.schema([(TOKEN_COLUMN, self._type)]),
            compression=compression,
            use_dictionary=False,
            write_page_checksum=True,
        )
        self._rows: list[np.ndarray] = []
        self._waiting = self.size = 0

    def add(self, ids: np.ndarray) -> None:
        """One document's ids."""
        self._rows.append(ids.astype(self._dtype))
        self._waiting += self._rows[-1].nbytes
        self.size += self._rows[-1].nbytes
        if self._waiting >= self._group_bytes:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow as pa

        offsets = np.cumsum([0, *map(len, self._rows)])
        values = pa.array(np.concatenate(self._rows), self._type.value_type)
        rows = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)
        table = pa.table({TOKEN_COLUMN: rows.cast(self._type)})
        self._file.write_table(table, row_group_size=len(self._rows))
        self._rows, self._waiting = [], 0

    def close(self) -> None:
        """Complete the file and put it on the disk."""
        if self._rows:
            self._write_group()
        self._file.close()
        synchronize(self._path)


def shard_path(folder: Path, number: int, kind: str) -> Path:
    """The name of a shard: 000_00000.parquet and on."""
    suffix = FLAT_SUFFIX if kind == "bin" else ".parquet"
    return folder / f"{number // 100000:03d}_{number % 100000:05d}{suffix}"


def remove_from(folder: Path, number: int, kind: str) -> None:
    """Remove the shard of this number and those after it: an earlier attempt did not vouch for them."""
    while (path := shard_path(folder, number, kind)).exists():
        os.unlink(path)
        number += 1
