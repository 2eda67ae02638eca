"""Samples cut from the encoded documents: packed, or each document alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from argonne.data.documents import Document, Mark
from argonne.data.position import DataPosition
from argonne.data.stream import Beginning, EncodedBatch
from argonne.errors import DataError


class Samples(NamedTuple):
    """Samples in stream order, and where the one after them begins."""

    tokens: np.ndarray
    """(count, block_size + 1) int32."""
    document: Document
    """The document of the next sample's first input token (its text left out)."""
    token_offset: int
    starts: np.ndarray
    """(count, block_size) bool: the input tokens that begin a document."""


class Sampler(Protocol):
    """Cuts samples from encoded documents."""

    def take(self, count: int) -> Samples: ...


def resumed(batches: Iterator[EncodedBatch], start: DataPosition) -> Iterator[EncodedBatch]:
    """The batches without what was used of the document at ``start``.

    Where that document has no more ids than that, all of them go. Where ``start`` is not a document (a row
    that is skipped, a row past the shard's end), the stream begins with the document after it: nothing was
    used of that one.
    """
    first = next(batches)
    ids, ((_, _, mark), *later) = first.ids, first.beginnings
    used = start.token_offset if mark[:3] == (start.epoch, start.file_index, start.row) else 0
    passed = 0
    while not later and passed + len(ids) <= used:
        passed += len(ids)
        following = next(batches)
        ids, later = following.ids, following.beginnings
    cut = min(used - passed, later[0][0] if later else len(ids))
    beginnings = [(0, passed + cut, mark), *((place - cut, token, mark) for place, token, mark in later)]
    yield EncodedBatch(ids[cut:], beginnings)
    yield from batches


class PackedSampler:
    """The packed stream: block_size + 1 tokens every block_size tokens, across documents and epochs.

    ``start`` None: the batches begin with the first token not used.
    """

    def __init__(self, batches: Iterator[EncodedBatch], block_size: int, start: DataPosition | None) -> None:
        self._batches = batches if start is None else resumed(batches, start)
        self._block_size = block_size
        self._chunks: deque[np.ndarray] = deque()
        self._available = 0
        self._beginnings: deque[Beginning] = deque()
        """Of the documents, from the one of the next token on; place 0 is the first token of this run."""
        self._starts: deque[int] = deque()
        """Places at which documents begin, from the first that was not taken on."""
        self._filled = 0
        self._taken = 0

    def take(self, count: int) -> Samples:
        size = count * self._block_size
        while self._available <= size:
            self._append(next(self._batches))
        tokens = self._chunks[0] if len(self._chunks) == 1 else np.concatenate(self._chunks)
        self._chunks = deque([tokens[size:]])
        self._available -= size
        self._taken += size
        while len(self._beginnings) > 1 and self._beginnings[1][0] <= self._taken:
            self._beginnings.popleft()
        samples = np.empty((count, self._block_size + 1), dtype=np.int32)
        samples[:, :-1] = tokens[:size].reshape(count, self._block_size)
        samples[:, 1:] = tokens[1 : size + 1].reshape(count, self._block_size)
        place, token, mark = self._beginnings[0]
        token_offset = token + self._taken - place
        return Samples(samples, Document.from_mark(mark), token_offset, self._take_starts(count))

    def _take_starts(self, count: int) -> np.ndarray:
        """Those among the samples just taken."""
        size = count * self._block_size
        flags = np.zeros(size, dtype=bool)
        while self._starts and self._starts[0] < self._taken:
            flags[self._starts.popleft() - (self._taken - size)] = True
        return flags.reshape(count, self._block_size)

    def _append(self, batch: EncodedBatch) -> None:
        ids, beginnings, starts = batch.ids, batch.beginnings, batch.starts
        self._beginnings.extend((self._filled + place, token, mark) for place, token, mark in beginnings)
        places = (
            [place for place, token, _ in beginnings if token == 0] if starts is None else starts.tolist()
        )
        self._starts.extend(self._filled + place for place in places)
        self._chunks.append(ids)
        self._available += len(ids)
        self._filled += len(ids)


class WindowSampler:
    """--no-packing: each document alone, in windows of block_size + 1 tokens every block_size tokens.

    Short documents and tails are dropped.
    """

    def __init__(self, batches: Iterator[EncodedBatch], block_size: int, start: DataPosition | None) -> None:
        self._batches = batches if start is None else resumed(batches, start)
        self._block_size = block_size
        self._windows: deque[tuple[np.ndarray, Mark, int]] = deque()
        self._rest = np.empty(0, dtype=np.int32)
        self._offset = 0
        """Token of the current document at which ``_rest`` begins."""
        self._mark: Mark | None = None
        """Of the current document."""
        self._sample_epoch: int | None = None

    def take(self, count: int) -> Samples:
        while len(self._windows) <= count:  # one more, to know where the next sample begins
            batch = next(self._batches)
            self._append(batch.ids, batch.beginnings)
        samples = np.stack([self._windows.popleft()[0] for _ in range(count)])
        _, mark, token_offset = self._windows[0]
        one_document = np.zeros((count, self._block_size), dtype=bool)
        return Samples(samples, Document.from_mark(mark), token_offset, one_document)

    def _append(self, ids: np.ndarray, beginnings: list[Beginning]) -> None:
        places = [place for place, _, _ in beginnings] + [len(ids)]
        self._cut(ids[: places[0]])
        for (place, token, mark), end in zip(beginnings, places[1:], strict=True):
            self._refuse_short_corpus(epoch=mark[0])
            self._mark, self._rest, self._offset = mark, self._rest[:0], token
            self._cut(ids[place:end])

    def _cut(self, ids: np.ndarray) -> None:
        """Take the windows out of the current document's tokens so far."""
        tokens = np.concatenate((self._rest, ids)) if len(self._rest) else ids
        size, start = self._block_size, 0
        while len(tokens) - start > size:
            assert self._mark is not None
            self._windows.append((tokens[start : start + size + 1], self._mark, self._offset + start))
            self._sample_epoch = self._mark[0]
            start += size
        self._rest, self._offset = tokens[start:], self._offset + start

    def _refuse_short_corpus(self, epoch: int) -> None:
        if self._sample_epoch is None:
            self._sample_epoch = epoch
        if epoch > self._sample_epoch + 1:
            raise DataError(
                f"no document has {self._block_size + 1} tokens (--no-packing with --block-size "
                f"{self._block_size}): lower --block-size or leave --no-packing out"
            )
