"""The token stream: documents -> tokens -> blocks, and the exact place in it.

``DocumentReader`` walks shards and rows for ever, ``encoded_documents`` turns them into token ids ahead of
need, ``PackedSampler`` (or ``WindowSampler``, for --no-packing) cuts samples of block_size + 1 tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import pyarrow as pa

from argonne.data.encoder_pool import EncoderPool
from argonne.data.formats import (
    ArrowReader,
    LongText,
    ParquetReader,
    ShardError,
    TextBatch,
    one_line,
    open_shard,
)
from argonne.data.shards import Shard, is_unchanged
from argonne.data.tokenizer import text_pieces
from argonne.errors import DataError

BATCH_CHARACTERS = 1 << 19
"""Text handed to one tokenizing worker at a time, characters."""
FIRST_BATCH_CHARACTERS = 1 << 13
"""The first batch is this small and each next one twice as large, so that the first step waits little."""
BATCHES_PER_WORKER = 2


@dataclass(frozen=True, kw_only=True)
class DataPosition:
    """Names the first input token of the next sample."""

    epoch: int = 0
    file_index: int = 0
    """Place of the shard in the natural order."""
    file_name: str = ""
    """The shard's name; "" where only the index is known (a pipeline checkpoint)."""
    row: int = 0
    """Row of the shard, skipped rows counted."""
    token_offset: int = 0
    """Token of the row's ids (EOS included); one past its end means the next row."""
    sample: int | None = None
    """Without streaming: samples of this epoch already taken; the other places then mean nothing."""
    block_size: int = 1

    @property
    def chunk(self) -> int:
        """The block of the row in which a pipeline script would go on."""
        return self.token_offset // self.block_size

    def to_dict(self, file_names: Sequence[str] = ()) -> dict[str, Any]:
        """Plain containers for a checkpoint, the pipeline scripts' keys beside ours."""
        return {
            "streaming": self.sample is None,
            "current_file_idx": self.file_index,
            "position_in_file": self.row,
            "chunk_offset": self.chunk,
            "current_position": self.sample or 0,
            "epoch": self.epoch,
            "files_processed": list(file_names[: self.file_index + 1]),
            "file_name": self.file_name,
            "row": self.row,
            "token_offset": self.token_offset,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], *, block_size: int, global_step: int) -> DataPosition:
        """Our own position or a pipeline checkpoint's (whose chunk, after the first step, was used)."""
        epoch = int(saved.get("epoch") or 0)
        file_index = int(saved.get("current_file_idx") or 0)
        if not saved.get("streaming", True):
            sample = int(saved.get("current_position") or 0)
            return cls(epoch=epoch, sample=sample, block_size=block_size)
        if "token_offset" in saved:
            return cls(
                epoch=epoch,
                file_index=file_index,
                file_name=str(saved["file_name"]),
                row=int(saved["row"]),
                token_offset=int(saved["token_offset"]),
                block_size=block_size,
            )
        chunk = int(saved.get("chunk_offset") or 0) + (1 if global_step > 0 else 0)
        row = int(saved.get("position_in_file") or 0)
        return cls(
            epoch=epoch,
            file_index=file_index,
            row=row,
            token_offset=chunk * block_size,
            block_size=block_size,
        )


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


class Samples(NamedTuple):
    """Samples in stream order, and where the one after them begins."""

    tokens: np.ndarray
    """(count, block_size + 1) int32."""
    document: Document
    """The document of the next sample's first input token (its text left out)."""
    token_offset: int


class Sampler(Protocol):
    """Cuts samples from encoded documents."""

    def take(self, count: int) -> Samples: ...


def _without_used(batches: Iterator[EncodedBatch], start: DataPosition) -> Iterator[EncodedBatch]:
    """Drop the used ids of the document at ``start``, whose mark then lies that far before the ids.

    Where the document has no more ids than that, all of them go and the next document is the first. Where
    ``start`` is not a document (a row that is skipped, a row past the shard's end), nothing was used.
    """
    first: Mark | None = None
    used = dropped = 0
    for ids, marks in batches:
        if first is None:
            first = marks[0][1]
            at_start = first[:3] == (start.epoch, start.file_index, start.row)
            used = start.token_offset if at_start else 0
        later = next((place for place, mark in marks if mark is not first), None)
        cut = min(used - dropped, len(ids) if later is None else later)
        dropped += cut
        yield EncodedBatch(
            ids[cut:], [(-used if mark is first else place - cut, mark) for place, mark in marks]
        )
        if later is not None:
            break
    yield from batches


class PackedSampler:
    """The packed stream: block_size + 1 tokens every block_size tokens, across documents and epochs."""

    def __init__(self, batches: Iterator[EncodedBatch], block_size: int, start: DataPosition) -> None:
        self._batches = _without_used(batches, start)
        self._block_size = block_size
        self._chunks: deque[np.ndarray] = deque()
        self._available = 0
        self._marks: deque[tuple[int, Mark]] = deque()
        """(stream index of the document's first id, its mark); index 0 is the first token not used."""
        self._filled = 0
        self._taken = 0

    def take(self, count: int) -> Samples:
        size = count * self._block_size
        while self._available <= size:
            self._append(*next(self._batches))
        tokens = self._chunks[0] if len(self._chunks) == 1 else np.concatenate(self._chunks)
        self._chunks = deque([tokens[size:]])
        self._available -= size
        self._taken += size
        while len(self._marks) > 1 and self._marks[1][0] <= self._taken:
            self._marks.popleft()
        samples = np.empty((count, self._block_size + 1), dtype=np.int32)
        samples[:, :-1] = tokens[:size].reshape(count, self._block_size)
        samples[:, 1:] = tokens[1 : size + 1].reshape(count, self._block_size)
        start, mark = self._marks[0]
        return Samples(samples, Document.from_mark(mark), self._taken - start)

    def _append(self, ids: np.ndarray, marks: list[tuple[int, Mark]]) -> None:
        self._marks.extend([(self._filled + offset, mark) for offset, mark in marks])
        self._chunks.append(ids)
        self._available += len(ids)
        self._filled += len(ids)


class WindowSampler:
    """--no-packing: each document alone, in windows of block_size + 1 tokens every block_size tokens.

    Short documents and tails are dropped.
    """

    def __init__(self, batches: Iterator[EncodedBatch], block_size: int, start: DataPosition) -> None:
        self._batches = _without_used(batches, start)
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
            self._append(*next(self._batches))
        samples = np.stack([self._windows.popleft()[0] for _ in range(count)])
        _, mark, token_offset = self._windows[0]
        return Samples(samples, Document.from_mark(mark), token_offset)

    def _append(self, ids: np.ndarray, marks: list[tuple[int, Mark]]) -> None:
        ends = [offset for offset, _ in marks] + [len(ids)]
        self._cut(ids[: max(ends[0], 0)])
        for (start, mark), end in zip(marks, ends[1:], strict=True):
            self._refuse_short_corpus(epoch=mark[0])
            self._mark, self._rest, self._offset = mark, self._rest[:0], max(0, -start)
            self._cut(ids[max(start, 0) : end])

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
