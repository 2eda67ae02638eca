"""Bytes to rows: the footer and the rows of one shard, parquet or Arrow IPC (file and stream).

A row group (an Arrow record batch counts as one) is the smallest unit that is read, checked and skipped.
Nothing here holds more than a few rows at a time, whatever the size of the row group.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from argonne.data.flat_tokens import FlatReader, is_flat
from argonne.data.remote import ShardPath
from argonne.data.shard_reader import ShardError, ShardReader, TextBatch
from argonne.data.token_rows import TokenColumn, TokenRow, check_token_column, to_token_rows
from argonne.errors import one_line

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_BYTES = 1 << 20
"""Text aimed at in one read, bytes (a single row may be longer)."""
BATCH_ROWS = 512
LONG_BYTES = 1 << 22
"""A longer text stays in its Arrow buffer and is decoded a stretch at a time."""
DIGEST_BYTES = 1 << 16
ARROW_FILE_MAGIC = b"ARROW1"


@dataclass(frozen=True, kw_only=True)
class Footer:
    """What the start-up check learns of one shard without reading its rows."""

    group_rows: tuple[int, ...]
    """Rows of each row group."""
    null_rows: int = 0
    """Rows without a text by the footer's statistics (0 where there are none)."""
    digest: str
    """Hash of the file's last 64 KiB, which hold a parquet file's row-group offsets and statistics."""


class LongText:
    """A long text as the UTF-8 bytes it was read as, so that it is never whole in memory a second time."""

    def __init__(self, buffer: Any) -> None:
        self._bytes = memoryview(buffer)

    def stretches(self, errors: str = "replace") -> Iterator[str]:
        """The text in order, each stretch decoded from up to BATCH_BYTES."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors)
        for start in range(0, len(self._bytes), BATCH_BYTES):
            end = start + BATCH_BYTES
            yield decoder.decode(self._bytes[start:end], final=end >= len(self._bytes))

    def is_valid(self) -> bool:
        """Whether all of it is UTF-8."""
        try:
            for _ in self.stretches("strict"):
                pass
        except UnicodeDecodeError:
            return False
        return True


def tail_digest(path: ShardPath) -> str:
    """Hash of the file's last DIGEST_BYTES: its footer, or most of it."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - DIGEST_BYTES))
        return hashlib.blake2b(file.read(), digest_size=8).hexdigest()


def check_text_column(schema: pa.Schema, column: str) -> None:
    """Raise ShardError unless ``column`` holds strings of any layout (plain, large, view, dictionary)."""
    import pyarrow.types as types

    described = ", ".join(f"{field.name}: {field.type}" for field in schema)
    if schema.names.count(column) != 1:
        raise ShardError(f"no column {column!r} (columns: {described or 'none'})")
    value_type = schema.field(column).type
    if types.is_null(value_type):
        raise ShardError(f"column {column!r} holds only nulls (columns: {described})")
    if types.is_dictionary(value_type):
        value_type = value_type.value_type
    if not (
        types.is_string(value_type) or types.is_large_string(value_type) or types.is_string_view(value_type)
    ):
        raise ShardError(f"column {column!r} is {value_type}, not text (columns: {described})")


def read_footer(path: ShardPath, column: str) -> Footer:
    """Check one shard by its footer; raises ShardError with the reason it cannot be used."""
    import pyarrow as pa

    try:
        if path.stat().st_size == 0:
            raise ShardError("0 bytes")
        with open_shard(path, column) as reader:
            group_rows, nulls = reader.group_rows, reader.null_rows()
        return Footer(group_rows=group_rows, null_rows=nulls, digest=tail_digest(path))
    except (pa.ArrowException, OSError, SystemError) as error:  # SystemError: a name that is no text
        raise ShardError(one_line(error)) from error


def open_shard(path: ShardPath, column: str) -> ShardReader:
    """A reader for the file's format; raises ShardError, OSError or pyarrow's exceptions."""
    if is_flat(path):
        return FlatReader(path, getattr(column, "vocab_size", None))
    with path.open("rb") as file:
        magic = file.read(8)
    is_arrow = path.suffix == ".arrow" or magic.startswith(ARROW_FILE_MAGIC)
    return ArrowReader(path, column) if is_arrow else ParquetReader(path, column)


def check_column(schema: pa.Schema, column: str) -> None:
    """Raise ShardError unless ``column`` holds what its kind says, texts or token ids."""
    if isinstance(column, TokenColumn):
        check_token_column(schema, column)
    else:
        check_text_column(schema, column)


def to_rows(array: Any, column: str, first_row: int) -> TextBatch:
    """The rows of an Arrow array as texts or token ids; ``first_row`` is the first one's in its shard."""
    is_tokens = isinstance(column, TokenColumn)
    return to_token_rows(array, column, first_row) if is_tokens else to_texts(array)


def rows_per_batch(rows: int, size: int) -> int:
    """Rows that hold about BATCH_BYTES of text, from the row group's totals."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(size, 1)))


def to_texts(array: Any) -> TextBatch:
    """The rows of an Arrow array as Python strings, bad UTF-8 replaced and named."""
    import pyarrow as pa

    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    if array.nbytes <= LONG_BYTES:
        try:
            return TextBatch(array.to_pylist(), frozenset())
        except UnicodeDecodeError:
            pass
    return _to_texts_one_by_one(array)


def _to_texts_one_by_one(array: Any) -> TextBatch:
    texts: list[str | LongText | TokenRow | None] = []
    replaced = set()
    for index, buffer in enumerate(_row_buffers(array)):
        if buffer is None:
            texts.append(None)
        elif buffer.size > LONG_BYTES:
            long_text = LongText(buffer)
            texts.append(long_text)
            if not long_text.is_valid():
                replaced.add(index)
        else:
            text = buffer.to_pybytes()
            try:
                texts.append(text.decode())
            except UnicodeDecodeError:
                replaced.add(index)
                texts.append(text.decode(errors="replace"))
    return TextBatch(texts, frozenset(replaced))


def _row_buffers(array: Any) -> Iterator[Any]:
    """The bytes of each row, None for null, without a copy (a pyarrow scalar would be one)."""
    import pyarrow as pa

    if pa.types.is_string_view(array.type):
        array = array.view(pa.binary_view()).cast(pa.large_binary())
    wide = array.type in (pa.large_string(), pa.large_binary())
    _, offsets, content = array.buffers()
    bounds = np.frombuffer(offsets, np.int64 if wide else np.int32)[array.offset :]
    for index, is_valid in enumerate(array.is_valid()):
        start, end = int(bounds[index]), int(bounds[index + 1])
        yield content.slice(start, end - start) if is_valid.as_py() else None


def check_offsets(array: Any) -> None:
    """Raise ArrowInvalid or ShardError where rows would reach out of their buffers (mapped as they are)."""
    import pyarrow as pa
    import pyarrow.compute as compute

    if isinstance(array, pa.DictionaryArray):
        array.indices.validate(full=True)
        bounds = compute.min_max(array.indices)
        low, high = bounds["min"].as_py(), bounds["max"].as_py()
        if low is not None and not 0 <= low <= high < len(array.dictionary):
            raise ShardError(f"a dictionary index outside 0 to {len(array.dictionary) - 1}")
        array = array.dictionary
    as_bytes = {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.string_view(): pa.binary_view(),
    }
    if array.type in as_bytes:
        array = array.view(as_bytes[array.type])  # as bytes: bad UTF-8 is replaced later
    array.validate(full=True)


class ParquetReader:
    """Rows of a parquet file, a row group at a time, page checksums verified where the file has them."""

    def __init__(self, path: ShardPath, column: str) -> None:
        import pyarrow.parquet as pq

        # Buffered and unmapped, a column chunk is read page by page: memory does not grow with the row group.
        self._file = pq.ParquetFile(
            path if isinstance(path, Path) else path.open(),
            buffer_size=BATCH_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )
        check_column(self._file.schema_arrow, column)
        self._column = column
        self._metadata = self._file.metadata
        paths = [self._metadata.schema.column(index).path for index in range(self._metadata.num_columns)]
        self._column_index = next(
            index for index, path in enumerate(paths) if path == column or path.startswith(f"{column}.")
        )
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
        """Values in a column of lists, by the footer (one for each row that has none)."""
        chunks = (self._metadata.row_group(g).column(self._column_index) for g in range(len(self.group_rows)))
        return sum(chunk.num_values for chunk in chunks)

    def batches(self, group: int) -> Iterator[TextBatch]:
        """The rows of a row group in order. Raises pa.ArrowException or OSError where they cannot be read."""
        chunk = self._metadata.row_group(group).column(self._column_index)
        batch_rows = rows_per_batch(self.group_rows[group], chunk.total_uncompressed_size)
        row = sum(self.group_rows[:group])
        for batch in self._file.iter_batches(
            batch_size=batch_rows, row_groups=[group], columns=[str(self._column)], use_threads=False
        ):
            yield to_rows(batch.column(0), self._column, row)
            row += batch.num_rows


class ArrowReader:
    """Rows of an Arrow IPC file or stream (as `datasets` saves them), memory-mapped, a batch at a time."""

    def __init__(self, path: ShardPath, column: str) -> None:
        import pyarrow as pa

        self._path, self._column = path, column
        is_local = isinstance(path, Path)
        self._source = pa.memory_map(str(path), "r") if is_local else pa.PythonFile(path.open("rb"), "r")
        self._size = self._source.size()
        self._is_file = self._source.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
        self._restart()
        check_column(self._reader.schema, column)
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
        return sum(batch.column(self._column).nbytes for batch in self._all_batches())

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
        batch_rows = rows_per_batch(len(array), array.nbytes)
        for start in range(0, len(array), batch_rows):
            # What is mapped and no longer there kills the process.
            if isinstance(self._path, Path) and self._path.stat().st_size < self._size:
                raise ShardError("it was cut while it was read")
            yield to_rows(array.slice(start, batch_rows), self._column, row + start)
