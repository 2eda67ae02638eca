"""The token stream: documents -> tokens -> blocks, and the exact place in it.

``DocumentReader`` walks shards and rows for ever, ``encoded_documents`` turns them into token ids ahead of
need, ``PackedSampler`` (or ``WindowSampler``, for --no-packing) cuts samples of block_size + 1 tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from argonne.data.encoder_pool import EncoderPool
from argonne.data.formats import (
    ArrowReader,
    LongText,
    ParquetReader,
    ShardError,
    TextBatch,
    open_shard,
)
from argonne.data.position import DataPosition
from argonne.data.shards import Shard, is_unchanged
from argonne.data.tokenizer import text_pieces
from argonne.errors import DataError, one_line

BATCH_CHARACTERS = 1 << 19
"""Text handed to one tokenizing worker at a time, characters."""
FIRST_BATCH_CHARACTERS = 1 << 13
"""The first batch is this small and each next one twice as large, so that the first step waits little."""
BATCHES_PER_WORKER = 2


class Counts(NamedTuple):
    """Rows passed since step 0."""

    documents: int = 0
    null_rows: int = 0
    empty_rows: int = 0
    replaced_rows: int = 0
    """Documents in which invalid UTF-8 was replaced by U+FFFD."""


class Document(NamedTuple):
    """A text, its place, and what had been passed before it."""

    epoch: int
    file_index: int
    row: int
    text: str | LongText
    counts: Counts
    skips: int
    """Number of recorded skips before it."""

    def mark(self) -> Mark:
        """What marks its tokens, which outlive the text."""
        return (self.epoch, self.file_index, self.row, *self.counts, self.skips)

    @classmethod
    def from_mark(cls, mark: Mark) -> Document:
        """The document without its text."""
        epoch, file_index, row, *counts, skips = mark
        return cls(epoch, file_index, row, "", Counts(*counts), skips)


Mark: TypeAlias = tuple[int, ...]
"""A document as (epoch, file index, row, counts, skips): thousands are in flight, and plain tuples of numbers
are the only ones that Python's garbage collector stops following."""
EncodedTexts: TypeAlias = tuple[np.ndarray, np.ndarray]
"""(ids int32, length of each text int64)."""


@dataclass
class DocumentReader:
    """Iterates over the documents from a position on, epoch after epoch.

    A row group that cannot be read raises DataError, or with ``skip_bad`` its remaining rows are passed over
    and recorded in ``skipped``. Memory is bounded by a few rows.
    """

    shards: Sequence[Shard]
    text_column: str
    position: DataPosition
    skip_bad: bool = False
    counts: Counts = field(default_factory=Counts)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    epochs: int | None = None
    """Stop after this many epochs (None: never)."""

    def __iter__(self) -> Iterator[Document]:
        epoch, first_file, first_row = self.position.epoch, self.position.file_index, self.position.row
        last_epoch = None if self.epochs is None else epoch + self.epochs
        while last_epoch is None or epoch < last_epoch:
            whole, before = first_file == 0 and first_row == 0, self.counts.documents
            for index in range(first_file, len(self.shards)):
                yield from self._shard_documents(epoch, index, first_row if index == first_file else 0)
            if whole and self.counts.documents == before:
                raise DataError(f"the {len(self.shards)} shards hold no text (--data-glob, --text-column)")
            epoch, first_file, first_row = epoch + 1, 0, 0

    def _shard_documents(self, epoch: int, index: int, first_row: int) -> Iterator[Document]:
        shard = self.shards[index]
        if shard.fault:
            self._record(epoch, shard, None, 0, shard.fault)
            return
        if first_row >= shard.rows:
            return
        try:
            reader = open_shard(shard.path, self.text_column)
            if reader.group_rows != shard.group_rows or not is_unchanged(shard):
                raise ShardError("it was rewritten since the run started")
        except (ShardError, pa.ArrowException, OSError) as error:
            self._record(epoch, shard, None, first_row, one_line(error), error)
            return
        with reader:
            for group in range(shard.group_of(first_row), len(shard.group_rows)):
                yield from self._group_documents(epoch, index, reader, group, first_row)

    def _group_documents(
        self, epoch: int, index: int, reader: ParquetReader | ArrowReader, group: int, first_row: int
    ) -> Iterator[Document]:
        shard = self.shards[index]
        row = shard.first_rows[group]
        batches = reader.batches(group)
        while True:
            try:
                batch = next(batches, None)
            except (ShardError, pa.ArrowException, OSError) as error:
                self._record(epoch, shard, group, max(row, first_row), one_line(error), error)
                return
            if batch is None:
                break
            yield from self._batch_documents(epoch, index, batch, row, first_row)
            row += len(batch.texts)
        if row != shard.first_rows[group + 1]:
            self._record(epoch, shard, group, max(row, first_row), "fewer rows than its footer says")

    def _batch_documents(
        self, epoch: int, index: int, batch: TextBatch, row: int, first_row: int
    ) -> Iterator[Document]:
        skips = len(self.skipped)  # grows between batches only
        documents, nulls, empty, replaced = self.counts
        for offset in range(max(0, first_row - row), len(batch.texts)):
            text = batch.texts[offset]
            if text is None:
                nulls += 1
            elif not text:
                empty += 1
            else:
                counts = Counts(documents, nulls, empty, replaced)
                documents += 1
                replaced += offset in batch.replaced
                yield Document(epoch, index, row + offset, text, counts, skips)
        self.counts = Counts(documents, nulls, empty, replaced)

    def _record(
        self,
        epoch: int,
        shard: Shard,
        group: int | None,
        row: int,
        reason: str,
        cause: Exception | None = None,
    ) -> None:
        """Note that the rest of a row group (None: of the shard) is passed over, or raise DataError."""
        if not self.skip_bad:
            where = f"{shard.path}" + ("" if group is None else f", row group {group}")
            raise DataError(f"cannot read {where}: {reason}: repair it, or --skip-bad-shards") from cause
        end = shard.rows if group is None else shard.first_rows[group + 1]
        self.skipped.append(
            {
                "epoch": epoch,
                "file_name": shard.name,
                "row_group": group,
                "row": row,
                "rows": end - row,
                "reason": reason,
            }
        )


class EncodedBatch(NamedTuple):
    """Consecutive tokens of the stream; ``marks`` are (offset in ids, mark) where documents begin."""

    ids: np.ndarray
    marks: list[tuple[int, Mark]]


def encoded_documents(documents: Iterator[Document], pool: EncoderPool) -> Iterator[EncodedBatch]:
    """Token ids of the documents in order, EOS after each, a bounded number of batches encoded ahead."""
    ahead: deque[tuple[Future[EncodedTexts], list[tuple[int, Mark]]]] = deque()
    for texts, last, marks in text_batches(documents):
        ahead.append((pool.submit(texts, last), marks))
        if len(ahead) > BATCHES_PER_WORKER * pool.workers:
            yield _finished(*ahead.popleft())
    while ahead:
        yield _finished(*ahead.popleft())


def _finished(future: Future[EncodedTexts], marks: list[tuple[int, Mark]]) -> EncodedBatch:
    ids, lengths = future.result()
    starts = [0, *np.cumsum(lengths).tolist()]
    return EncodedBatch(ids, [(starts[piece], mark) for piece, mark in marks])


def text_batches(
    documents: Iterator[Document],
) -> Iterator[tuple[list[str], list[bool], list[tuple[int, Mark]]]]:
    """(texts, whether each ends its document, [(text index, mark)]) of about BATCH_CHARACTERS."""
    texts: list[str] = []
    last: list[bool] = []
    marks: list[tuple[int, Mark]] = []
    size, limit = 0, min(FIRST_BATCH_CHARACTERS, BATCH_CHARACTERS)
    for document in documents:
        marks.append((len(texts), document.mark()))
        for piece, ends in text_pieces(document.text):
            texts.append(piece)
            last.append(ends)
            size += len(piece)
            if size >= limit:
                yield texts, last, marks
                texts, last, marks, size = [], [], [], 0
                limit = min(2 * limit, BATCH_CHARACTERS)
    if texts:
        yield texts, last, marks
