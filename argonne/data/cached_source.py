"""--no-streaming: the samples of the token cache in a shuffled order, and which of them hold a document."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from argonne.data.documents import DocumentReader
from argonne.data.position import DataPosition
from argonne.data.shards import Shard
from argonne.data.source import DataProgress, SourceOptions, TakenSamples
from argonne.data.token_cache import TokenCache, open_cache, row_key
from argonne.data.tokenizer import EncoderRecipe
from argonne.errors import DataError


def epoch_order(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The order of the samples in an epoch: Philox keyed by (seed, epoch)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(samples)


@dataclass(eq=False)
class CachedSamples:
    """The samples that one pass of the corpus is cut into, numbered as they lie."""

    cache: TokenCache
    shards: Sequence[Shard]
    options: SourceOptions
    """Whose ``excluded`` the cache was made without."""

    def __post_init__(self) -> None:
        cache, size = self.cache, self.options.block_size
        if self.options.packing:
            self.starts = np.arange(0, max(0, len(cache.tokens) - 1) // size * size, size)
        else:
            windows = np.maximum(np.diff(cache.starts, append=len(cache.tokens)) - 1, 0) // size
            first = np.repeat(np.cumsum(windows) - windows, windows)
            self.starts = np.repeat(cache.starts, windows) + (np.arange(windows.sum()) - first) * size
        if len(self.starts) == 0:
            raise DataError(
                f"the corpus of {len(cache.tokens)} tokens has no sample of {size + 1}: lower --block-size"
            )
        self._rows: np.ndarray | None = cache.rows

    @property
    def rows(self) -> np.ndarray:
        """`row_key` of each document; for a cache of an older version the corpus is read."""
        if self._rows is None:
            options = self.options
            reader = DocumentReader(
                self.shards,
                options.column,
                DataPosition(),
                options.skip_bad_shards,
                epochs=1,
                holdout=options.part,
                excluded=options.excluded,
            )
            self._rows = np.array([row_key(one.file_index, one.row) for one in reader], dtype=np.int64)
        return self._rows

    def of_row(self, file_index: int, row: int) -> np.ndarray:
        """Numbers of the samples that hold a token of a row, as an input or a target; none of other rows."""
        key, rows = row_key(file_index, row), self.rows
        number = int(np.searchsorted(rows, key))
        if number == len(rows) or rows[number] != key:
            return np.empty(0, np.int64)
        begin = int(self.cache.starts[number])
        after = self.cache.starts[number + 1 :]
        end = int(after[0]) if len(after) else len(self.cache.tokens)
        if begin == end:
            return np.empty(0, np.int64)
        return self._touching(begin, end)

    def of_shard(self, file_index: int) -> np.ndarray:
        """Numbers of the samples that hold a token of any row of a shard."""
        first, last = np.searchsorted(self.rows, [row_key(file_index, 0), row_key(file_index + 1, 0)])
        if first == last:
            return np.empty(0, np.int64)
        bounds = np.append(self.cache.starts, len(self.cache.tokens))
        return self._touching(int(bounds[first]), int(bounds[last]))

    def _touching(self, begin: int, end: int) -> np.ndarray:
        """The samples with one of the tokens from ``begin`` on, ``end`` left out."""
        first, last = np.searchsorted(self.starts, [begin - self.options.block_size, end])
        return np.arange(first, last)

    def take(self, dropped: np.ndarray, epoch: int, sample: int) -> Iterator[tuple[int, int]]:
        """(epoch, number) of one sample after another, without end, from a place in an epoch's order on."""
        epoch, sample = epoch + sample // len(self.starts), sample % len(self.starts)
        while True:
            for number in epoch_order(self.options.seed, epoch, len(self.starts))[sample:].tolist():
                if not dropped[number]:
                    yield epoch, number
            epoch, sample = epoch + 1, 0

    def without(self, excluded: Mapping[int, Collection[int]]) -> np.ndarray:
        """(samples,) bool: those that hold a token of a row that the cache has and ``excluded`` names."""
        dropped = np.zeros(len(self.starts), dtype=bool)
        for index, rows in excluded.items():
            for row in rows:
                dropped[self.of_row(index, row)] = True
        return dropped


class CachedSource:
    """Samples of the cached corpus, epoch after epoch, each in its own order.

    The cache is built at the first step, that is in the feed's thread, where nobody's time-out runs. It lacks
    the documents that were excluded when the run began; of those excluded since, it is the samples that hold
    a token of them that are passed over, so that the order and every place in it stay what they are.
    """

    def __init__(
        self,
        shards: list[Shard],
        recipe: EncoderRecipe,
        tokenizer: str,
        options: SourceOptions,
        progress: DataProgress,
    ) -> None:
        made = cached_options(options)
        self._build = lambda: CachedSamples(open_cache(shards, recipe, tokenizer, made), shards, made)
        self._options = options
        self._eos = int(recipe.tokenizer.eos_token_id)
        self.progress = progress
        self._samples: CachedSamples | None = None
        self._order: tuple[int, np.ndarray] | None = None

    def _open(self) -> CachedSamples:
        samples = self._build()
        later = excluded_later(self._options)
        self._dropped = samples.without(later)
        if self._dropped.all():
            raise DataError("every sample holds a token of an excluded document (--exclude-documents)")
        self._counts = samples.cache.counts._replace(
            excluded_rows=samples.cache.counts.excluded_rows + sum(map(len, later.values()))
        )
        return samples

    def take(self, count: int) -> TakenSamples:
        samples = self._samples = self._samples or self._open()
        cache, starts, size = samples.cache, samples.starts, self._options.block_size
        epoch, sample = self.progress.position.epoch, self.progress.position.sample or 0
        epoch, sample = epoch + sample // len(starts), sample % len(starts)
        tokens = np.empty((count, size + 1), dtype=np.int32)
        begins = np.zeros((count, size), dtype=bool)
        for index in range(count):
            while self._dropped[self._epoch_order(epoch)[sample]]:
                epoch, sample = _next(epoch, sample, len(starts))
            start = starts[self._epoch_order(epoch)[sample]]
            tokens[index] = cache.tokens[start : start + size + 1]
            if cache.blocks:
                begins[index, 1:] = tokens[index, : size - 1] == self._eos
            else:
                first, last = np.searchsorted(cache.starts, [start, start + size])
                begins[index, cache.starts[first:last] - start] = True
            epoch, sample = _next(epoch, sample, len(starts))
        self.progress = replace(
            self.progress,
            position=DataPosition(epoch=epoch, sample=sample, block_size=size),
            samples=self.progress.samples + count,
            counts=self._counts,
            skipped=cache.skipped,
        )
        return TakenSamples(tokens, begins if self._options.document_attention else None)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            assert self._samples is not None
            self._order = epoch, epoch_order(self._options.seed, epoch, len(self._samples.starts))
        return self._order[1]

    def close(self) -> None:
        """Nothing to end: the map goes with the object."""


def _next(epoch: int, sample: int, samples: int) -> tuple[int, int]:
    return (epoch + 1, 0) if sample + 1 == samples else (epoch, sample + 1)


def cached_options(options: SourceOptions) -> SourceOptions:
    """With the documents that the cache was made without as the excluded ones."""
    return options if options.cached_without is None else replace(options, excluded=options.cached_without)


def excluded_later(options: SourceOptions) -> dict[int, frozenset[int]]:
    """The rows that were excluded after the cache was made."""
    made = cached_options(options).excluded
    later = {
        index: frozenset(rows) - frozenset(made.get(index, ())) for index, rows in options.excluded.items()
    }
    return {index: rows for index, rows in later.items() if rows}
