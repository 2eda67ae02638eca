"""What every reader of a shard offers, whatever its format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from argonne.data.texts import TextBatch


class ShardReader(Protocol):
    """One open shard. A row group is the smallest unit that is read, checked and skipped."""

    group_rows: tuple[int, ...]
    """Rows of each row group."""

    def __enter__(self) -> ShardReader: ...

    def __exit__(self, *_: object) -> None: ...

    def null_rows(self) -> int:
        """Rows without a text, as far as the format tells without reading them."""
        ...

    def text_bytes(self) -> int:
        """Size of the text column, uncompressed."""
        ...

    def token_count(self) -> int:
        """Ids in a column of token ids, as far as the format tells without reading them."""
        ...

    def batches(self, group: int) -> Iterator[TextBatch]:
        """The rows of a row group in order. Raises ShardError, pa.ArrowException or OSError."""
        ...
