"""Rows of token ids: list columns of parquet and Arrow files, read as they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from argonne.data.texts import ShardError, TextBatch

LARGEST_ID = 2**31 - 1


class TokenColumn(str):
    """The name of a column of token ids, "" where there are only flat files, and how many ids exist."""

    __slots__ = ("vocab_size",)
    vocab_size: int | None

    def __new__(cls, name: str, vocab_size: int | None = None) -> TokenColumn:
        """``vocab_size`` None: any id of 31 bits is taken."""
        column = super().__new__(cls, name)
        column.vocab_size = vocab_size
        return column


def describe_column(column: str) -> str:
    """What a checkpoint, the footer index and the token cache keep of it."""
    if not isinstance(column, TokenColumn):
        return column
    return f"{column} (tokens)" if column else "flat token files"


class TokenRow:
    """The ids of one row, which is a document, or a block of a stream in which EOS ids end documents."""

    __slots__ = ("ids", "is_block")

    def __init__(self, ids: np.ndarray, is_block: bool = False) -> None:
        self.ids = ids
        """int32."""
        self.is_block = is_block

    def __len__(self) -> int:
        return len(self.ids)

    def copy(self) -> TokenRow:
        """The row for keeps: its ids lie in what was read, a whole row group or a mapped file."""
        return TokenRow(self.ids.copy(), self.is_block)


def checked_ids(ids: np.ndarray, vocab_size: int | None) -> tuple[np.ndarray, int]:
    """The ids as int32, and the place of the first that is none of the vocabulary's (-1: all are)."""
    limit = LARGEST_ID if vocab_size is None else vocab_size - 1
    if len(ids) and (int(ids.max()) > limit or int(ids.min()) < 0):
        return ids, int(np.argmax((ids > limit) | (ids < 0)))
    return ids.astype(np.int32, copy=False), -1


def beyond_vocabulary(token: Any, vocab_size: int | None) -> str:
    """The end of a sentence about an id."""
    limit = "31 bits" if vocab_size is None else f"the vocabulary of {vocab_size}"
    return f"the id {int(token)} is beyond {limit}"


def check_token_column(schema: Any, column: str) -> None:
    """Raise ShardError unless ``column`` holds lists of whole numbers of any width.

    Lists are plain, large or of a fixed size; they or their numbers may be dictionary-encoded.
    """
    import pyarrow.types as types

    described = ", ".join(f"{field.name}: {field.type}" for field in schema)
    if schema.names.count(column) != 1:
        raise ShardError(f"no column {str(column)!r} (columns: {described or 'none'})")
    list_type = schema.field(column).type
    if types.is_dictionary(list_type):
        list_type = list_type.value_type
    is_list = (
        types.is_list(list_type) or types.is_large_list(list_type) or types.is_fixed_size_list(list_type)
    )
    value_type = list_type.value_type if is_list else None
    if value_type is not None and types.is_dictionary(value_type):
        value_type = value_type.value_type
    if value_type is None or not types.is_integer(value_type):
        raise ShardError(
            f"column {str(column)!r} is {list_type}, not lists of token ids (columns: {described})"
        )


def to_token_rows(array: Any, column: str, first_row: int) -> TextBatch:
    """The rows of an Arrow list array, of which the first is row ``first_row`` of its shard.

    Rows of a fixed-size list are blocks of a stream. Raises ShardError, with row and place, for a null among
    the ids and for an id that the vocabulary does not have.
    """
    import pyarrow as pa

    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary.take(array.indices)
    is_block = pa.types.is_fixed_size_list(array.type)
    if is_block:
        array = array.cast(pa.large_list(array.type.value_type))
    values = array.values
    if isinstance(values, pa.DictionaryArray):
        values = values.dictionary_decode()
    offsets = array.offsets.to_numpy()
    start, end = int(offsets[0]), int(offsets[-1])
    values = values.slice(start, end - start)
    vocab_size = getattr(column, "vocab_size", None)
    places = offsets - start
    if values.null_count:
        null = int(np.argmin(values.is_valid().to_numpy(zero_copy_only=False)))
        raise ShardError(f"{_place(places, null, first_row)}: a null among the token ids")
    ids, wrong = checked_ids(values.to_numpy(), vocab_size)
    if wrong >= 0:
        where = _place(places, wrong, first_row)
        raise ShardError(f"{where}: {beyond_vocabulary(ids[wrong], vocab_size)}")
    valid = array.is_valid().to_pylist()
    rows: list[Any] = [
        TokenRow(ids[places[i] : places[i + 1]], is_block) if valid[i] else None for i in range(len(array))
    ]
    return TextBatch(rows, frozenset())


def _place(offsets: np.ndarray, index: int, first_row: int) -> str:
    row = int(np.searchsorted(offsets, index, side="right")) - 1
    return f"row {first_row + row}, token {index - int(offsets[row])}"
