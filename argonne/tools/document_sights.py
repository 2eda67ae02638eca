"""In which epochs the stretch of data that a step took holds a document, by the kind of its stream."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from argonne.data.cached_source import CachedSamples, epoch_order
from argonne.data.exclusion_resume import document_tokens
from argonne.data.order import Place, RowPlaces
from argonne.data.shards import Shard
from argonne.data.source import SourceOptions
from argonne.errors import DataError

Excluded = Mapping[int, Collection[int]]
"""Rows by the shard's number."""


class Wanted(NamedTuple):
    """What is looked for: a row of a shard, or (row None) any row of it."""

    shard: str
    row: int | None
    source: str | None = None
    """None: every source that has the shard."""


class Sights(Protocol):
    """One source, as the positions in the metrics tell what was taken of it."""

    shards: Sequence[Shard]

    def first(self) -> Mapping[str, Any]:
        """The position before the first step."""
        ...

    def epochs(
        self, wanted: Wanted, before: Mapping[str, Any], after: Mapping[str, Any], excluded: Excluded
    ) -> Iterator[int]:
        """The epochs in which the stretch between two positions trained on it."""
        ...


def number_of(shards: Sequence[Shard], name: str) -> int | None:
    """Of a shard in the natural order; None where the source has none of this name."""
    return next((number for number, known in enumerate(shards) if known.name == name), None)


@dataclass(eq=False)
class StreamSights:
    """A packed stream: what lies between two positions was trained on, each one's row included.

    The token at the position after a step was the last target of the step.
    """

    options: SourceOptions
    shards: Sequence[Shard]
    tokenizer: Any = None
    places: RowPlaces = field(init=False)

    def __post_init__(self) -> None:
        self.places = RowPlaces(self.shards, self.options.order)
        self._numbers = {shard.name: number for number, shard in enumerate(self.shards)}

    def first(self) -> Mapping[str, Any]:
        index, row = self.options.order.first(0, self.shards)
        return {"epoch": 0, "file_name": self.shards[index].name, "row": row, "token_offset": 0}

    def epochs(
        self, wanted: Wanted, before: Mapping[str, Any], after: Mapping[str, Any], excluded: Excluded
    ) -> Iterator[int]:
        number = self._numbers.get(wanted.shard)
        if number is None or (wanted.row is not None and wanted.row in excluded.get(number, ())):
            return
        first, last = self._place(before), self._place(after)
        for epoch in range(first[0], last[0] + 1):
            if wanted.row is None:
                rank = (epoch, self.places.rank_of_shard(epoch, number))
                if first[:2] <= rank <= last[:2] and self._has_any(epoch, number, before, after, excluded):
                    yield epoch
            elif self._has(epoch, number, wanted.row, before, after):
                yield epoch

    def _place(self, position: Mapping[str, Any]) -> Place:
        number = self._numbers.get(str(position["file_name"]))
        if number is None:
            raise DataError(f"{position['file_name']} is gone from the data (--data-glob): restore it")
        return self.places.place(int(position["epoch"]), number, int(position["row"]))

    def _has(
        self, epoch: int, number: int, row: int, before: Mapping[str, Any], after: Mapping[str, Any]
    ) -> bool:
        return self._place(before) <= self.places.place(epoch, number, row) <= self._place(after)

    def _has_any(
        self,
        epoch: int,
        number: int,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        excluded: Excluded,
    ) -> bool:
        """Whether a row of the shard was trained on, the shard lying in the stretch."""
        return len(excluded.get(number, ())) < self.shards[number].rows


@dataclass(eq=False)
class WindowSights(StreamSights):
    """--no-packing: a document counts where a window of it was taken; one shorter than a window never is.

    The documents that are asked about are tokenized one by one, and only those.
    """

    _lengths: dict[tuple[int, int], int] = field(default_factory=dict)

    def _has(
        self, epoch: int, number: int, row: int, before: Mapping[str, Any], after: Mapping[str, Any]
    ) -> bool:
        place, first, last = self.places.place(epoch, number, row), self._place(before), self._place(after)
        if not first <= place <= last:
            return False
        begin = int(before["token_offset"]) if place == first else 0
        if place == last:  # the position is that of the next window
            return int(after["token_offset"]) > begin
        return self._tokens(number, row) > begin + self.options.block_size

    def _has_any(
        self,
        epoch: int,
        number: int,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        excluded: Excluded,
    ) -> bool:
        left_out = excluded.get(number, ())
        rows = (row for row in range(self.shards[number].rows) if row not in left_out)
        return any(self._has(epoch, number, row, before, after) for row in rows)

    def _tokens(self, number: int, row: int) -> int:
        key = number, row
        if key not in self._lengths:
            self._lengths[key] = document_tokens(self.options, self.shards[number], row, self.tokenizer)
        return self._lengths[key]


@dataclass(eq=False)
class CachedSights:
    """--no-streaming: a document counts where a sample that holds a token of it was taken."""

    samples: CachedSamples
    shards: Sequence[Shard]
    _orders: dict[int, np.ndarray] = field(default_factory=dict)
    _dropped: dict[int, np.ndarray] = field(default_factory=dict)

    def first(self) -> Mapping[str, Any]:
        return {"epoch": 0, "current_position": 0}

    def epochs(
        self, wanted: Wanted, before: Mapping[str, Any], after: Mapping[str, Any], excluded: Excluded
    ) -> Iterator[int]:
        number = number_of(self.shards, wanted.shard)
        if number is None:
            return
        samples = self.samples
        held = samples.of_shard(number) if wanted.row is None else samples.of_row(number, wanted.row)
        if excluded:
            held = held[~self._without(excluded)[held]]
        first, last = ((int(one["epoch"]), int(one["current_position"])) for one in (before, after))
        for epoch in range(first[0], last[0] + 1):
            places = self._places(epoch)[held]
            begin = first[1] if epoch == first[0] else 0
            end = last[1] if epoch == last[0] else len(samples.starts)
            if ((begin <= places) & (places < end)).any():
                yield epoch

    def _places(self, epoch: int) -> np.ndarray:
        """Of each sample in the epoch's order."""
        if epoch not in self._orders:
            seed = self.samples.options.seed
            self._orders = {epoch: np.argsort(epoch_order(seed, epoch, len(self.samples.starts)))}
        return self._orders[epoch]

    def _without(self, excluded: Excluded) -> np.ndarray:
        if id(excluded) not in self._dropped:
            self._dropped[id(excluded)] = self.samples.without(excluded)
        return self._dropped[id(excluded)]
