"""Arrow columns to texts: which types hold text, and their rows as Python strings.

Nothing here holds more than a few rows of text at a time, whatever the size of the row group.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

    from argonne.data.token_rows import TokenRow

BATCH_BYTES = 1 << 20
"""Text aimed at in one read, bytes (a single row may be longer)."""
BATCH_ROWS = 512
LONG_BYTES = 1 << 22
"""A longer text stays in its Arrow buffer and is decoded a stretch at a time."""


class ShardError(Exception):
    """A shard or a row group that cannot be used; the message is the reason, without the shard's name."""


@dataclass(frozen=True)
class TextBatch:
    """Consecutive rows of one row group."""

    texts: list[str | LongText | TokenRow | None]
    replaced: frozenset[int]
    """Indices into ``texts`` whose bytes were not UTF-8 (each bad sequence became U+FFFD)."""


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


def check_text_column(schema: pa.Schema, column: str) -> int:
    """The index of ``column``; ShardError unless it holds texts (or nulls alone) in any layout."""
    described = ", ".join(f"{field.name}: {field.type}" for field in schema)
    count = schema.names.count(column)
    if count == 0:
        raise ShardError(f"no column {column!r} (columns: {described or 'none'})")
    if count > 1:
        raise ShardError(f"{count} columns are named {column!r}: rename all but the one with the text")
    index: int = schema.names.index(column)
    if not holds_text(schema.field(index).type):
        raise ShardError(f"column {column!r} is {schema.field(index).type}, not text (columns: {described})")
    return index


def holds_text(value_type: Any) -> bool:
    """Whether a type is strings, bytes that may be UTF-8, JSON, a dictionary of these, or null alone."""
    import pyarrow as pa
    from pyarrow import types

    if isinstance(value_type, pa.BaseExtensionType):
        return holds_text(value_type.storage_type)
    if types.is_dictionary(value_type) or types.is_run_end_encoded(value_type):
        return holds_text(value_type.value_type)
    return any(
        is_kind(value_type)
        for is_kind in (
            types.is_null,
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
        )
    )


def plain_layout(array: Any) -> Any:
    """The same rows as strings of some width: without extension type, run ends and dictionary."""
    import pyarrow as pa
    import pyarrow.compute as compute

    if isinstance(array, pa.ExtensionArray):
        return plain_layout(array.storage)
    if isinstance(array, pa.RunEndEncodedArray):
        return plain_layout(compute.run_end_decode(array))
    if isinstance(array, pa.DictionaryArray):
        return plain_layout(array.dictionary_decode())
    as_text = {
        pa.binary(): pa.string(),
        pa.large_binary(): pa.large_string(),
        pa.binary_view(): pa.string_view(),
    }
    return array.view(as_text[array.type]) if array.type in as_text else array


def array_bytes(array: Any) -> int:
    """Memory of an Arrow array's rows; of views under older pyarrow, that of its whole buffers."""
    try:
        return int(array.nbytes)
    except TypeError:  # "Extracting byte ranges not supported for type string_view"
        return int(array.get_total_buffer_size())


def rows_per_batch(rows: int, size: int) -> int:
    """Rows that hold about BATCH_BYTES of text, from the row group's totals."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(size, 1)))


def to_texts(array: Any) -> TextBatch:
    """The rows of an Arrow array as Python strings, bad UTF-8 replaced and named."""
    import pyarrow as pa

    array = plain_layout(array)
    if pa.types.is_null(array.type):
        return TextBatch([None] * len(array), frozenset())
    if array_bytes(array) <= LONG_BYTES:
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

    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if isinstance(array, pa.RunEndEncodedArray):
        array.run_ends.validate(full=True)
        array = array.values
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
    # As bytes: bad UTF-8 is replaced later.
    array.view(as_bytes.get(array.type, array.type)).validate(full=True)
