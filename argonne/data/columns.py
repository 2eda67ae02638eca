"""A column of a shard is texts or token ids: checked and read by its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from argonne.data.texts import TextBatch, check_text_column, to_texts
from argonne.data.token_rows import TokenColumn, check_token_column, to_token_rows

if TYPE_CHECKING:
    import pyarrow as pa


def check_column(schema: pa.Schema, column: str) -> int:
    """The index of ``column``; ShardError unless it holds what its kind says, texts or token ids."""
    if not isinstance(column, TokenColumn):
        return check_text_column(schema, column)
    check_token_column(schema, column)
    index: int = schema.names.index(str(column))
    return index


def to_rows(array: Any, column: str, first_row: int) -> TextBatch:
    """The rows of an Arrow array as texts or token ids; ``first_row`` is the first one's in its shard."""
    is_tokens = isinstance(column, TokenColumn)
    return to_token_rows(array, column, first_row) if is_tokens else to_texts(array)
