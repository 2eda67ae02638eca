"""The documents of the corpus in order, epoch after epoch, from any position on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from argonne.data.formats import open_shard
from argonne.data.holdout import Holdout
from argonne.data.order import NaturalOrder, Order
from argonne.data.position import DataPosition
from argonne.data.shard_reader import ShardReader
from argonne.data.shards import Shard, is_unchanged
from argonne.data.shuffled import KeptGroups, WholeGroup, read_group
from argonne.data.texts import LongText, ShardError, TextBatch
from argonne.data.token_rows import TokenRow
from argonne.errors import DataError, one_line

DOCUMENT_COST = 256
"""Characters that each document counts for beside its own: what it costs to carry, however short it is."""
KEPT_COST = 1 << 19
"""A corpus of at most this cost stays in memory after its first epoch instead of being read again."""


class Counts(NamedTuple):
    """Rows passed since step 0."""

    documents: int = 0
    null_rows: int = 0
    empty_rows: int = 0
    replaced_rows: int = 0
    """Documents in which invalid UTF-8 was replaced by U+FFFD."""
    held_out_rows: int = 0
    """Documents left to the other part of a source that --holdout splits."""
    excluded_rows: int = 0
    """Documents that --exclude-documents names."""


class Document(NamedTuple):
    """A text, its place, and what had been passed before it."""

    epoch: int
    file_index: int
    row: int
    text: str | LongText | TokenRow
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


def no_text(shards: Sequence[Shard], counts: Counts) -> str:
    """The message for a corpus without a document."""
    what = "text (--data-glob, --text-column)"
    if counts.held_out_rows:
        what = f"document in this part of it: all {counts.held_out_rows} are in the other (--holdout)"
    if counts.excluded_rows:
        what = f"document that is left: {counts.excluded_rows} are excluded (--exclude-documents)"
    return f"the {len(shards)} shards hold no {what}"


def _total(counts: Counts, more: Counts) -> Counts:
    return Counts(*(a + b for a, b in zip(counts, more, strict=True)))


def _difference(counts: Counts, before: Counts) -> Counts:
    return Counts(*(a - b for a, b in zip(counts, before, strict=True)))


@dataclass
class _KeptEpoch:
    """The documents of one whole epoch of a small corpus, to be repeated."""

    before: Counts
    """Counts before the epoch."""
    documents: list[Document] = field(default_factory=list)
    """Their counts are those since the epoch began."""
    cost: int = 0
    passed: Counts = field(default_factory=Counts)
    """Rows passed in the whole epoch."""

    def add(self, document: Document) -> bool:
        """Keep one more document; False where the corpus is too large to be kept."""
        if isinstance(document.text, LongText):
            return False
        text = document.text
        if isinstance(text, TokenRow):
            document = document._replace(text=text.copy())
            self.cost += text.ids.nbytes + DOCUMENT_COST
        else:
            self.cost += len(text) + DOCUMENT_COST
        self.documents.append(document._replace(counts=_difference(document.counts, self.before)))
        return self.cost <= KEPT_COST

    def again(self, epoch: int, counts: Counts, skips: int) -> Iterator[Document]:
        """The same documents in ``epoch``, where ``counts`` and ``skips`` lie before it."""
        for document in self.documents:
            yield document._replace(epoch=epoch, counts=_total(counts, document.counts), skips=skips)


@dataclass
class DocumentReader:
    """Iterates over the documents from a position on, epoch after epoch.

    A corpus of at most KEPT_COST that was read without a fault is kept and repeated from memory for as long
    as its files stay as they are.

    A row group that cannot be read raises DataError, or with ``skip_bad`` its remaining rows are passed over
    and recorded in ``skipped``. Memory is bounded by a few rows and KEPT_COST.
    """

    shards: Sequence[Shard]
    text_column: str
    position: DataPosition
    skip_bad: bool = False
    counts: Counts = field(default_factory=Counts)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    epochs: int | None = None
    """Stop after this many epochs (None: never)."""
    order: Order = field(default_factory=NaturalOrder)
    holdout: Holdout | None = None
    """The part of the documents to read; None: all."""
    excluded: Mapping[int, Collection[int]] = field(default_factory=dict)
    """Rows to pass over, by the shard's number."""

    def __post_init__(self) -> None:
        self._kept_groups = KeptGroups(KEPT_COST, DOCUMENT_COST)

    def __iter__(self) -> Iterator[Document]:
        epoch, start = self.position.epoch, (self.position.file_index, self.position.row)
        last_epoch = None if self.epochs is None else epoch + self.epochs
        first_epoch = epoch
        while last_epoch is None or epoch < last_epoch:
            whole = epoch != first_epoch or start == self.order.first(epoch, self.shards)
            before, skips = self.counts, len(self.skipped)
            kept = _KeptEpoch(before) if whole and self.order.repeats else None
            shards = self.order.shards(epoch, len(self.shards))
            for index in shards if whole else shards[shards.index(start[0]) :]:
                first_row = start[1] if not whole and index == start[0] else None
                for document in self._shard_documents(epoch, index, first_row):
                    if kept is not None and not kept.add(document):
                        kept = None
                    yield document
            if kept is not None and kept.documents and len(self.skipped) == skips:
                kept.passed = _difference(self.counts, before)
                while (last_epoch is None or epoch + 1 < last_epoch) and self._unchanged():
                    epoch += 1
                    yield from kept.again(epoch, self.counts, skips)
                    self.counts = _total(self.counts, kept.passed)
            if whole and self.counts.documents == before.documents:
                raise DataError(no_text(self.shards, self.counts))
            epoch += 1

    def _unchanged(self) -> bool:
        try:
            return all(is_unchanged(shard) for shard in self.shards)
        except OSError:
            return False  # reading it again says what is wrong

    def _shard_documents(self, epoch: int, index: int, first_row: int | None) -> Iterator[Document]:
        """The documents of one shard, those before ``first_row`` in the order left out (None: all)."""
        shard = self.shards[index]
        if shard.fault:
            self._record(epoch, shard, None, 0, shard.fault)
            return
        if (first_row or 0) >= shard.rows:
            return
        groups = self.order.groups(epoch, index, shard, first_row)
        if self._is_kept(index):
            for group, rows in groups:
                yield from self._kept_documents(epoch, index, group, rows)
            return
        try:
            reader = open_shard(shard.path, self.text_column)
            if reader.group_rows != shard.group_rows or not is_unchanged(shard):
                raise ShardError("it was rewritten since the run started")
        except (ShardError, pa.ArrowException, OSError) as error:
            self._record(epoch, shard, None, first_row or 0, one_line(error), error)
            return
        with reader:
            for group, rows in groups:
                if rows is None:
                    yield from self._group_documents(epoch, index, reader, group, first_row or 0)
                else:
                    yield from self._shuffled_documents(epoch, index, reader, group, rows)

    def _group_documents(
        self, epoch: int, index: int, reader: ShardReader, group: int, first_row: int
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
            offsets = range(max(0, first_row - row), len(batch.texts))
            yield from self._batch_documents(epoch, index, batch, row, offsets)
            row += len(batch.texts)
        if row != shard.first_rows[group + 1]:
            self._record(epoch, shard, group, max(row, first_row), "fewer rows than its footer says")

    def _shuffled_documents(
        self, epoch: int, index: int, reader: ShardReader, group: int, rows: np.ndarray
    ) -> Iterator[Document]:
        """The documents of a row group in the order of ``rows``; it is read whole first, or skipped whole."""
        shard = self.shards[index]
        try:
            batch = read_group(reader, group)
        except (ShardError, pa.ArrowException, OSError) as error:
            self._record(epoch, shard, group, shard.first_rows[group], one_line(error), error)
            return
        self._kept_groups.add(index, group, batch)
        yield from self._batch_documents(epoch, index, batch, shard.first_rows[group], rows.tolist())

    def _is_kept(self, index: int) -> bool:
        """Whether the shard's rows lie in memory and its file is as it was."""
        shard = self.shards[index]
        try:
            return self._kept_groups.holds(index, len(shard.group_rows)) and is_unchanged(shard)
        except OSError:
            return False  # reading it again says what is wrong

    def _kept_documents(
        self, epoch: int, index: int, group: int, rows: np.ndarray | None
    ) -> Iterator[Document]:
        batch = self._kept_groups.get(index, group)
        assert batch is not None and rows is not None, "only a shuffled order keeps row groups"
        first_row = self.shards[index].first_rows[group]
        yield from self._batch_documents(epoch, index, batch, first_row, rows.tolist())

    def _batch_documents(
        self, epoch: int, index: int, batch: TextBatch | WholeGroup, row: int, offsets: Iterable[int]
    ) -> Iterator[Document]:
        """The documents among the rows at ``offsets`` of a batch that begins at ``row``, in that order."""
        skips = len(self.skipped)  # grows between batches only
        documents, nulls, empty, replaced, held_out, excluded = self.counts
        left_out = self.excluded.get(index, ())
        for offset in offsets:
            text = batch.texts[offset]
            if isinstance(text, bytes):
                text = text.decode()
            if text is None:
                nulls += 1
            elif not text:
                empty += 1
            elif row + offset in left_out:
                excluded += 1
            elif self.holdout is not None and not self.holdout.keeps(text):
                held_out += 1
            else:
                counts = Counts(documents, nulls, empty, replaced, held_out, excluded)
                documents += 1
                replaced += offset in batch.replaced
                yield Document(epoch, index, row + offset, text, counts, skips)
        self.counts = Counts(documents, nulls, empty, replaced, held_out, excluded)

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
