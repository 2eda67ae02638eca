"""Rows of an Arrow IPC file or stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from argonne.data.columns import check_column, to_rows
from argonne.data.remote import ShardPath
from argonne.data.texts import (
    ShardError,
    TextBatch,
    array_bytes,
    check_offsets,
    rows_per_batch,
)

ARROW_FILE_MAGIC = b"ARROW1"


class ArrowReader:
    """Rows of an Arrow IPC file or stream (as `datasets` saves them), memory-mapped, a batch at a time."""

    def __init__(self, path: ShardPath, column: str) -> None:
        import pyarrow as pa

        self._path, self._name = path, column
        is_local = isinstance(path, Path)
        self._source = pa.memory_map(str(path), "r") if is_local else pa.PythonFile(path.open("rb"), "r")
        self._size = self._source.size()
        self._is_file = self._source.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
        self._restart()
        self._column = check_column(self._reader.schema, column)
        self.group_rows = tuple(batch.num_rows for batch in self._all_batches())

    def __enter__(self) -> ArrowReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._source.close()

    def _restart(self) -> None:
        import pyarrow as pa

        self._source.seek(0)
        self._reader: Any = (
            pa.ipc.open_file(self._source) if self._is_file else pa.ipc.open_stream(self._source)
        )
        self._next_group = 0

    def _all_batches(self) -> Iterator[Any]:
        if self._is_file:
            yield from (self._reader.get_batch(index) for index in range(self._reader.num_record_batches))
            return
        self._restart()
        yield from self._reader
        self._restart()

    def null_rows(self) -> int:
        """Null rows, counted."""
        return sum(batch.column(self._column).null_count for batch in self._all_batches())

    def text_bytes(self) -> int:
        """Size of the text column in memory."""
        return sum(array_bytes(batch.column(self._column)) for batch in self._all_batches())

    def token_count(self) -> int:
        """Values in a column of lists."""
        return sum(len(batch.column(self._column).flatten()) for batch in self._all_batches())

    def _batch(self, group: int) -> Any:
        if self._is_file:
            return self._reader.get_batch(group)
        if group < self._next_group:
            self._restart()
        batch = None
        while self._next_group <= group:  # mapped: passing over a batch touches its header only
            batch = self._reader.read_next_batch()
            self._next_group += 1
        return batch

    def batches(self, group: int) -> Iterator[TextBatch]:
        """The rows of a record batch in order. Raises ShardError, pa.ArrowException or OSError."""
        array = self._batch(group).column(self._column)
        check_offsets(array)
        row = sum(self.group_rows[:group])
        batch_rows = rows_per_batch(len(array), array_bytes(array))
        for start in range(0, len(array), batch_rows):
            # What is mapped and no longer there kills the process.
            if isinstance(self._path, Path) and self._path.stat().st_size < self._size:
                raise ShardError("it was cut while it was read")
            yield to_rows(array.slice(start, batch_rows), self._name, row + start)
