"""In which order an epoch takes the shards, row groups and rows of a source: as they lie, or shuffled.

A shuffled order follows from seed, epoch and the shard's number alone, so that any place in it is found
without reading what came before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from argonne.data.shards import Shard

Place = tuple[int, int, int]
"""Epoch, the shard's number in the epoch's order, the row's number in the shard's order."""
SHARDS_KEY = 0xFFFFFFFF
"""Stands for the shards in the key of an epoch's generator, where others have the shard's number."""


def _generator(seed: int, epoch: int, number: int) -> np.random.Generator:
    key = np.array([seed, (epoch << 32) | number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


class Order(Protocol):
    """The order of one source's rows."""

    repeats: bool
    """Whether every epoch has the same order."""

    def shards(self, epoch: int, count: int) -> Sequence[int]:
        """Shards by their number in the natural order."""
        ...

    def groups(
        self, epoch: int, index: int, shard: Shard, first_row: int | None
    ) -> Iterator[tuple[int, np.ndarray | None]]:
        """Row groups of shard ``index`` from ``first_row`` on (None: all), each with the order of its rows.

        Rows are counted within the row group, those before ``first_row`` left out; None: as they lie.
        """
        ...

    def first(self, epoch: int, shards: Sequence[Shard]) -> tuple[int, int]:
        """(shard, row) with which the epoch begins."""
        ...


@dataclass(frozen=True)
class NaturalOrder:
    """Shards and rows as they lie."""

    repeats = True

    def shards(self, epoch: int, count: int) -> Sequence[int]:
        return range(count)

    def groups(
        self, epoch: int, index: int, shard: Shard, first_row: int | None
    ) -> Iterator[tuple[int, np.ndarray | None]]:
        for group in range(shard.group_of(first_row or 0), len(shard.group_rows)):
            yield group, None

    def first(self, epoch: int, shards: Sequence[Shard]) -> tuple[int, int]:
        return 0, 0


@dataclass(frozen=True)
class ShuffledOrder:
    """``--shuffle``: another permutation of shards, of row groups and of the rows of each, every epoch.

    One generator of the epoch permutes the shards. One of each shard gives the permutation of its row groups,
    then, for each row group in that order, the permutation of its rows.
    """

    seed: int
    repeats = False

    def shards(self, epoch: int, count: int) -> Sequence[int]:
        return _generator(self.seed, epoch, SHARDS_KEY).permutation(count).tolist()

    def _all_groups(self, epoch: int, index: int, shard: Shard) -> Iterator[tuple[int, np.ndarray]]:
        generator = _generator(self.seed, epoch, index)
        for group in generator.permutation(len(shard.group_rows)).tolist():
            yield group, generator.permutation(shard.group_rows[group])

    def groups(
        self, epoch: int, index: int, shard: Shard, first_row: int | None
    ) -> Iterator[tuple[int, np.ndarray | None]]:
        begun = first_row is None
        for group, rows in self._all_groups(epoch, index, shard):
            if first_row is not None and not begun:
                if group != shard.group_of(first_row):
                    continue
                begun = True
                place = np.flatnonzero(rows == first_row - shard.first_rows[group])[0]
                yield group, rows[place:]
                continue
            yield group, rows

    def first(self, epoch: int, shards: Sequence[Shard]) -> tuple[int, int]:
        for index in self.shards(epoch, len(shards)):
            for group, rows in self._all_groups(epoch, index, shards[index]):
                if len(rows):
                    return index, shards[index].first_rows[group] + int(rows[0])
        return 0, 0


@dataclass(eq=False)
class RowPlaces:
    """Where the rows of a source stand in the order of each epoch, found without reading them."""

    shards: Sequence[Shard]
    order: Order
    _ranks: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    _shard_ranks: tuple[int, dict[int, int]] = (-1, {})
    """Of the epoch asked about last."""

    def place(self, epoch: int, shard: int, row: int) -> Place:
        """Where a row stands in an epoch."""
        return (epoch, self.rank_of_shard(epoch, shard), self._rank_of_row(epoch, shard, row))

    def rank_of_shard(self, epoch: int, shard: int) -> int:
        """Where a shard stands in an epoch."""
        if self._shard_ranks[0] != epoch:
            order = self.order.shards(epoch, len(self.shards))
            self._shard_ranks = epoch, {number: rank for rank, number in enumerate(order)}
        return self._shard_ranks[1][shard]

    def _rank_of_row(self, epoch: int, shard: int, row: int) -> int:
        if isinstance(self.order, NaturalOrder):
            return row
        key = (epoch, shard)
        if key not in self._ranks:
            held = self.shards[shard]
            groups = [
                held.first_rows[group] + (np.arange(held.group_rows[group]) if rows is None else rows)
                for group, rows in self.order.groups(epoch, shard, held, None)
            ]
            rows = np.concatenate(groups) if groups else np.empty(0, np.int64)
            self._ranks[key] = np.argsort(rows)
        ranks = self._ranks[key]
        return int(ranks[row]) if row < len(ranks) else row
