"""One row group in memory, so that its rows can be taken in any order."""

from __future__ import annotations

from dataclasses import dataclass

from argonne.data.shard_reader import ShardReader
from argonne.data.texts import LongText, ShardError
from argonne.data.token_rows import TokenRow


@dataclass(frozen=True)
class WholeGroup:
    """All rows of a row group."""

    texts: list[bytes | LongText | TokenRow | None]
    """Texts as UTF-8, ids as they are."""
    replaced: frozenset[int]
    """Indices into ``texts`` whose bytes were not UTF-8."""


def read_group(reader: ShardReader, group: int) -> WholeGroup:
    """All rows of a row group. Raises ShardError, pa.ArrowException or OSError."""
    texts: list[bytes | LongText | TokenRow | None] = []
    replaced: set[int] = set()
    for batch in reader.batches(group):
        replaced.update(len(texts) + offset for offset in batch.replaced)
        texts += [_own(text) for text in batch.texts]
    if len(texts) != reader.group_rows[group]:
        raise ShardError("fewer rows than its footer says")
    return WholeGroup(texts, frozenset(replaced))


def _own(text: str | LongText | TokenRow | None) -> bytes | LongText | TokenRow | None:
    if isinstance(text, str):
        return text.encode()
    return text.copy() if isinstance(text, TokenRow) else text


class KeptGroups:
    """The row groups of a small corpus, kept once they were read, for the epochs to come."""

    def __init__(self, largest_cost: int, row_cost: int) -> None:
        """``largest_cost``: of the whole corpus, in bytes of text and ``row_cost`` for each row."""
        self._left = largest_cost
        self._row_cost = row_cost
        self._groups: dict[tuple[int, int], WholeGroup] | None = {}

    def add(self, index: int, group: int, batch: WholeGroup) -> None:
        """Keep row group ``group`` of shard ``index``; forget all where the corpus is too large."""
        if self._groups is None or (index, group) in self._groups:
            return
        for text in batch.texts:
            size = _size(text)
            self._left -= self._left + 1 if isinstance(text, LongText) else size + self._row_cost
        if self._left < 0:
            self._groups = None
        else:
            self._groups[index, group] = batch

    def get(self, index: int, group: int) -> WholeGroup | None:
        """The row group, where it is kept."""
        return None if self._groups is None else self._groups.get((index, group))

    def holds(self, index: int, groups: int) -> bool:
        """Whether all of the shard's row groups are kept."""
        return all(self.get(index, group) is not None for group in range(groups))


def _size(text: bytes | LongText | TokenRow | None) -> int:
    """Bytes of a row in memory."""
    if isinstance(text, TokenRow):
        return text.ids.nbytes
    return len(text) if isinstance(text, bytes) else 0
