"""The stream of a source whose rows are token ids already: no tokenizer, no EOS of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from argonne.data.documents import Document, Mark
from argonne.data.flat_tokens import is_flat
from argonne.data.formats import open_shard
from argonne.data.position import DataPosition
from argonne.data.remote import ShardPath
from argonne.data.shards import Shard, find_shards, open_corpus
from argonne.data.stream import Beginning, EncodedBatch
from argonne.data.texts import ShardError
from argonne.data.token_rows import TokenRow
from argonne.errors import DataError

if TYPE_CHECKING:
    from argonne.data.source import SourceOptions

BATCH_TOKENS = 1 << 16


def open_shards(options: SourceOptions) -> tuple[SourceOptions, list[Shard]]:
    """The options of one source by what its shards hold, and the shards; DataError as `open_corpus`."""
    shards = open_corpus(
        options.data_glob,
        options.column,
        skip_bad_shards=options.skip_bad_shards,
        cache_dir=options.cache_dir if options.keeps_index else None,
        remote_cache=options.remote_cache,
    )
    return _for_tokens(options, shards), shards


def _for_tokens(options: SourceOptions, shards: Sequence[Shard]) -> SourceOptions:
    """The options of a source of tokens where the shards are flat files, which no flag has to name.

    Raises DataError where text and tokens are mixed in one source, or cut where there are no documents.
    """
    flat = [shard.name for shard in shards if is_flat(shard.name)]
    if flat and options.token_column is None:
        if len(flat) < len(shards):
            raise DataError(
                f"{len(flat)} of {len(shards)} shards are flat token files ({flat[0]}), the others are not "
                "(--data-glob): make them two sources (--data-mix), or name the others' --token-column"
            )
        options = replace(options, token_column="")
    if flat and not options.packing:
        raise DataError(
            f"--no-packing cuts documents, and a flat token file ({flat[0]}) has no rows: leave it out"
        )
    if flat and options.holdout is not None:
        raise DataError(
            f"--holdout takes documents out, and a flat token file ({flat[0]}) has no rows: leave it out"
        )
    return options


def source_by_columns(options: SourceOptions, data_glob: str | Sequence[str]) -> SourceOptions:
    """The options of one source of a mixture, or of a validation set, beside others of another kind.

    With ``--token-column`` it is text where its first shard lacks that column and has the text column. Raises
    DataError where there is no shard.
    """
    options = replace(options, data_glob=data_glob, mix=())
    if options.token_column is not None:
        first = find_shards(data_glob, options.remote_cache)[0].path
        if not _opens(first, options.column) and _opens(first, options.text_column):
            return replace(options, token_column=None)
    return options


def _opens(path: ShardPath, column: str) -> bool:
    try:
        with open_shard(path, column):
            return True
    except (ShardError, pa.ArrowException, OSError):
        return False


def with_vocabulary(options: SourceOptions, tokenizer: Any) -> SourceOptions:
    """The options with the number of ids that exist: where the model did not say, the tokenizer's."""
    if options.vocab_size is not None:
        return options
    ids = tokenizer.get_vocab().values()
    return replace(options, vocab_size=max(len(tokenizer), 1 + max(ids)))


def token_batches(documents: Iterator[Document], start: DataPosition, eos: int) -> Iterator[EncodedBatch]:
    """The rows' ids in order, without those of the row at ``start`` that were used.

    A row begins a document; in rows that are blocks of a stream, what follows an ``eos`` does, and what does
    not follow the block before.
    """
    batch = _Batch(eos)
    for number, document in enumerate(documents):
        row: Any = document.text
        assert isinstance(row, TokenRow)
        mark, used = document.mark(), 0
        if number == 0 and mark[:3] == (start.epoch, start.file_index, start.row):
            used = start.token_offset
        if used < len(row):
            batch.add(row, mark, used)
        if batch.size >= BATCH_TOKENS:
            yield batch.take()
    if batch.size:
        yield batch.take()


class _Batch:
    """Rows gathered into one batch."""

    def __init__(self, eos: int) -> None:
        self._eos = eos
        self._follows: tuple[int, ...] = ()
        """The mark's first places that a block must have to continue the last one."""
        self._after_eos = False
        self._empty()

    def _empty(self) -> None:
        self._ids: list[np.ndarray] = []
        self._beginnings: list[Beginning] = []
        self._starts: list[np.ndarray] = []
        self._blocks = False
        self.size = 0

    def add(self, row: TokenRow, mark: Mark, used: int) -> None:
        """Add a row's ids from ``used`` on."""
        ids = row.ids[used:]
        starts = np.empty(0, np.int64)
        begins = used == 0
        if row.is_block:
            self._blocks = True
            starts = np.flatnonzero(ids[:-1] == self._eos) + 1
            begins = begins and (self._after_eos or mark[:3] != self._follows)
            self._follows, self._after_eos = (*mark[:2], mark[2] + 1), bool(ids[-1] == self._eos)
        self._starts.append(self.size + (np.concatenate(([0], starts)) if begins else starts))
        self._beginnings.append((self.size, used, mark))
        self._ids.append(ids)
        self.size += len(ids)

    def take(self) -> EncodedBatch:
        """The batch, which is then empty."""
        ids = np.concatenate(self._ids) if len(self._ids) > 1 else self._ids[0]
        starts = np.concatenate(self._starts) if self._blocks else None
        batch = EncodedBatch(ids, self._beginnings, starts=starts)
        self._empty()
        return batch
