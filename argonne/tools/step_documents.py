"""Which document each input token of a step comes from: the step's stretch of the data is read again.

The tokens found are compared with the step's, so that a place is never wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from argonne.data.cached_source import CachedSamples, cached_options, excluded_later
from argonne.data.documents import DocumentReader, Mark
from argonne.data.encoder_pool import EncoderPool
from argonne.data.excluded import Exclusion, RowsOfSources
from argonne.data.flat_tokens import block_position
from argonne.data.samplers import WindowSampler, resumed
from argonne.data.stream import EncodedBatch, encoded_documents
from argonne.data.token_cache import ROW_BITS, find_cache
from argonne.data.token_stream import token_batches, with_vocabulary
from argonne.data.tokenizer import EncoderRecipe, tokenizer_fingerprint
from argonne.errors import DataError
from data_stream import open_sources

if TYPE_CHECKING:
    from argonne.data.position import DataPosition
    from argonne.data.shards import Shard
    from argonne.data.source import DataProgress, SourceOptions


class Piece(NamedTuple):
    """Consecutive input tokens of one sample that belong to one document."""

    sample: int
    begin: int
    end: int
    """Places in the sample's inputs, the end left out."""


@dataclass(frozen=True, kw_only=True)
class StepDocument:
    """A document, as far as one step saw it."""

    source: str
    """Of a mixture; "" without one."""
    epoch: int
    shard: str
    row: int
    token: int
    """Its first token in the step, counted in the document."""
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """Input tokens in the step."""
        return sum(piece.end - piece.begin for piece in self.pieces)

    def place(self) -> str:
        """Where it lies, in words."""
        named = f"{self.source}: " if self.source else ""
        return f"{named}{self.shard}, row {self.row}, from token {self.token}, epoch {self.epoch}"


class _Run(NamedTuple):
    """Consecutive input tokens of a source in the step: the first one's place, and the document."""

    place: int
    token: int
    mark: Mark | None


def step_documents(
    options: SourceOptions,
    tokenizer: Any,
    before: DataProgress,
    tokens: np.ndarray,
    sources: Sequence[int] | None,
    cached_without: RowsOfSources | None = None,
) -> list[StepDocument]:
    """The documents of a step in the order in which it met them.

    Args:
        before: where the data stood before the step.
        tokens: (samples, block_size + 1), the step's.
        sources: of a mixture, the number of each sample's source.
        cached_without: of a run without streaming, the documents that its token caches were made without.

    Raises DataError where the data no longer gives the step's tokens.
    """
    options = with_vocabulary(options, tokenizer)
    found: list[StepDocument] = []
    opened, made = open_sources(options), Exclusion.of(cached_without or {})
    for number, (name, position) in enumerate(before.positions.items()):
        mine = [index for index in range(len(tokens)) if sources is None or int(sources[index]) == number]
        if not mine:
            continue
        part, shards = opened[name]
        part = replace(part, cached_without=made.by_number(name, shards))
        found += _of_source(part, shards, tokenizer, name, position, tokens, mine)
    return sorted(found, key=lambda document: document.pieces[0])


def _of_source(
    options: SourceOptions,
    shards: list[Shard],
    tokenizer: Any,
    name: str,
    position: DataPosition,
    tokens: np.ndarray,
    mine: list[int],
) -> list[StepDocument]:
    size = options.block_size
    if position.sample is not None:
        return _cached(options, shards, tokenizer, name, position, tokens, mine)
    position = block_position(position)
    reader = DocumentReader(
        shards,
        options.column,
        position,
        options.skip_bad_shards,
        order=options.order,
        holdout=options.part,
        excluded=options.excluded,
    )
    pool = None
    if options.token_column is None:
        recipe = EncoderRecipe(tokenizer=tokenizer, trust_remote_code=options.trust_remote_code)
        pool = EncoderPool(recipe, 1)
        batches = resumed(encoded_documents(iter(reader), pool, 1), position)
    else:
        batches = token_batches(iter(reader), position, int(tokenizer.eos_token_id))
    try:
        if options.packing:
            runs, ids = _packed(batches, len(mine) * size)
            wanted = tokens[mine, :-1].reshape(-1)
        else:
            runs, ids = _windows(batches, size, len(mine))
            wanted = tokens[mine, :-1].reshape(-1)
    finally:
        if pool is not None:
            pool.close()
    if not np.array_equal(ids, wanted):
        where = f" of source {name!r}" if name else ""
        raise DataError(
            f"the data{where} from {position.describe()} on no longer gives the step's tokens: restore it"
        )
    return _joined(name, shards, runs, mine, size)


def _packed(batches: Iterator[EncodedBatch], count: int) -> tuple[list[_Run], np.ndarray]:
    runs: list[_Run] = []
    chunks: list[np.ndarray] = []
    filled = 0
    while filled < count:
        batch = next(batches)
        runs += [_Run(filled + place, token, mark) for place, token, mark in batch.beginnings]
        chunks.append(batch.ids)
        filled += len(batch.ids)
    return [run for run in runs if run.place < count], np.concatenate(chunks)[:count]


class _Windows(WindowSampler):
    """Windows with the document that each is cut from."""

    def next_window(self) -> tuple[np.ndarray, Mark, int]:
        while not self._windows:
            batch = next(self._batches)
            self._append(batch.ids, batch.beginnings)
        return self._windows.popleft()


def _windows(batches: Iterator[EncodedBatch], size: int, count: int) -> tuple[list[_Run], np.ndarray]:
    sampler = _Windows(batches, size, None)
    found = [sampler.next_window() for _ in range(count)]
    runs = [_Run(number * size, token, mark) for number, (_, mark, token) in enumerate(found)]
    return runs, np.concatenate([window[:-1] for window, _, _ in found])


def _joined(
    name: str, shards: list[Shard], runs: list[_Run], mine: list[int], size: int
) -> list[StepDocument]:
    """One entry a document, cut into pieces at the edges of samples."""
    documents: dict[tuple[int, ...], StepDocument] = {}
    ends = [run.place for run in runs[1:]] + [len(mine) * size]
    for run, end in zip(runs, ends, strict=True):
        assert run.mark is not None
        key = run.mark[:3]
        pieces = tuple(_pieces(run.place, end, mine, size))
        if not pieces:
            continue
        if key in documents:
            known = documents[key]
            documents[key] = replace(known, pieces=(*known.pieces, *pieces))
        else:
            epoch, index, row = key
            documents[key] = StepDocument(
                source=name, epoch=epoch, shard=shards[index].name, row=row, token=run.token, pieces=pieces
            )
    return list(documents.values())


def _pieces(begin: int, end: int, mine: list[int], size: int) -> Iterator[Piece]:
    while begin < end:
        number, place = divmod(begin, size)
        stop = min(size, place + end - begin)
        yield Piece(mine[number], place, stop)
        begin += stop - place


def _cached(
    options: SourceOptions,
    shards: list[Shard],
    tokenizer: Any,
    name: str,
    position: DataPosition,
    tokens: np.ndarray,
    mine: list[int],
) -> list[StepDocument]:
    """In the shuffled order of samples: the documents of which each sample has tokens."""
    made = cached_options(options)
    samples = CachedSamples(find_cache(shards, tokenizer_fingerprint(tokenizer), made), shards, made)
    assert position.sample is not None
    taken = samples.take(samples.without(excluded_later(options)), position.epoch, position.sample)
    starts, rows, size = samples.cache.starts, samples.rows, options.block_size
    documents: dict[tuple[int, int], StepDocument] = {}
    for sample, (epoch, number) in zip(mine, taken, strict=False):
        begin = int(samples.starts[number])
        if not np.array_equal(samples.cache.tokens[begin : begin + size], tokens[sample, :-1]):
            raise DataError(
                f"the token cache no longer gives the step's tokens from {position.describe()} on"
            )
        first, last = np.searchsorted(starts, [begin, begin + size - 1], side="right") - 1
        for document in range(int(first), int(last) + 1):
            stop = int(starts[document + 1]) if document < last else begin + size
            piece = Piece(sample, max(int(starts[document]), begin) - begin, stop - begin)
            if piece.begin == piece.end:
                continue  # without token ids
            index, row = divmod(int(rows[document]), 1 << ROW_BITS)
            token = begin + piece.begin - int(starts[document])
            known = documents.setdefault(
                (epoch, document),
                StepDocument(
                    source=name, epoch=epoch, shard=shards[index].name, row=row, token=token, pieces=()
                ),
            )
            documents[epoch, document] = replace(
                known, token=min(known.token, token), pieces=(*known.pieces, piece)
            )
    return list(documents.values())
