"""Rows of an Arrow IPC file or stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from argonne.data.arrow_batches import batch_places, node_of
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
    """Rows of an Arrow IPC file or stream (as `datasets` saves them), a batch at a time.

    A local file is memory-mapped. Of a remote one the headers of the batches are read, then the batches that
    are used; one with dictionaries, on which its batches rest, is read from its start.
    """

    def __init__(self, path: ShardPath, column: str) -> None:
        import pyarrow as pa

        self._path, self._name = path, column
        if isinstance(path, Path):
            self._source, self._places = pa.memory_map(str(path), "r"), None
        else:
            self._file = path.open("rb")
            self._source = pa.PythonFile(self._file, "r")
            self._places = batch_places(self._file, path.stat().st_size)
            self._source.seek(0)
        self._size = self._source.size()
        self._is_file = self._source.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
        self._restart()
        self._column = check_column(self._reader.schema, column)
        if self._places is None:
            self.group_rows = tuple(batch.num_rows for batch in self._all_batches())
        else:
            self.group_rows = tuple(place.rows for place in self._places)

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
        if self._places is not None:
            node = node_of(self._reader.schema, self._column)
            return sum(place.null_counts[node] for place in self._places)
        return sum(batch.column(self._column).null_count for batch in self._all_batches())

    def text_bytes(self) -> int:
        """Size of the text column in memory."""
        return sum(array_bytes(batch.column(self._column)) for batch in self._all_batches())

    def token_count(self) -> int:
        """Values in a column of lists."""
        return sum(len(batch.column(self._column).flatten()) for batch in self._all_batches())

    def _batch(self, group: int) -> Any:
        import pyarrow as pa

        if self._places is not None:
            place = self._places[group]
            self._file.seek(place.start)
            message = pa.ipc.read_message(self._file.read(place.end - place.start))
            return pa.ipc.read_record_batch(message, self._reader.schema)
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
