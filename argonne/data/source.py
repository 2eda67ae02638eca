"""What rank 0 trains on: from options and a checkpoint's data state to the tokens of each optimizer step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from argonne.data.documents import Counts, Document, DocumentReader
from argonne.data.encoder_pool import EncoderPool
from argonne.data.excluded import Exclusion
from argonne.data.find_shards import shown
from argonne.data.flat_tokens import block_position, file_position
from argonne.data.holdout import Holdout
from argonne.data.order import NaturalOrder, Order, ShuffledOrder
from argonne.data.position import DataPosition
from argonne.data.samplers import PackedSampler, Sampler, WindowSampler
from argonne.data.shards import Shard
from argonne.data.stream import EncodedBatch, encoded_documents
from argonne.data.token_rows import TokenColumn
from argonne.data.token_stream import token_batches
from argonne.errors import DataError

NO_HASH = "0" * 32
"""The stream hash before the first sample."""


class MixPart(NamedTuple):
    """One source of a mixture."""

    name: str
    weight: str
    """A decimal fraction, not normalised."""
    glob: str


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Everything that decides the tokens of a step, and how they are made; the flags have the defaults."""

    data_glob: str | Sequence[str]
    """Pattern, file or folder, or several of them, of the one source; a mixture has those of its parts."""
    mix: tuple[MixPart, ...] = ()
    """The sources of a mixture; empty: one source."""
    block_size: int
    samples_per_step: int
    """G: sequences of one optimizer step over all data-parallel ranks."""
    text_column: str
    token_column: str | None = None
    """Column of token ids, "" for flat files; None: the source is text."""
    vocab_size: int | None = None
    """Ids that exist (None: not checked)."""
    streaming: bool
    packing: bool
    shuffle: bool = False
    """Take shards, row groups and rows in another order every epoch (streaming only)."""
    seed: int
    """Of the shuffled and of the non-streaming order."""
    holdout: int | None = None
    """Every so many-th document, by a hash of its text, is held out of training; None: none is."""
    held_out: bool = False
    """Read the held-out documents instead of all others."""
    exclude: str | Path | Exclusion | None = None
    """Documents to leave out: the file that lists them, or the list."""
    exclude_elsewhere: bool = False
    """The file may name documents of other data, that of other stages or of the other sources."""
    source_name: str = ""
    """Of the source of a mixture that is opened alone: the list names it so."""
    excluded: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """Of one source, once its shards are known: the rows to leave out, by the shard's number."""
    cached_without: Mapping[int, frozenset[int]] | None = None
    """Without streaming: the rows that the token cache was made without; None: ``excluded``."""
    num_proc: int
    """Tokenizing workers at most (cut to the CPUs)."""
    trust_remote_code: bool
    skip_bad_shards: bool
    allow_data_change: bool
    document_attention: bool = False
    """Tell where documents begin, too."""
    remote_cache: Path | None = None
    """Where what is read of remote shards is kept (None: nowhere)."""
    cache_dir: Path | None
    """Where the shard index and the non-streaming token cache lie."""
    keeps_index: bool = True
    """Write the shard index; False for who must leave the folder as it is."""

    @property
    def column(self) -> str:
        """The column to read: a TokenColumn where the source has token ids."""
        if self.token_column is not None:
            return TokenColumn(self.token_column, self.vocab_size)
        return self.text_column

    @property
    def order(self) -> Order:
        return ShuffledOrder(self.seed) if self.shuffle else NaturalOrder()

    @property
    def part(self) -> Holdout | None:
        """The part of each source that is read; None: all of it."""
        return None if self.holdout is None else Holdout(every=self.holdout, held_out=self.held_out)


@dataclass(frozen=True, kw_only=True)
class DataProgress:
    """The state of the stream after the last sample of a step."""

    position: DataPosition
    stream_hash: str = NO_HASH
    """h(i+1) = blake2b(h(i) + the sample's block_size + 1 ids as little-endian int32), 16 bytes, in hex."""
    samples: int = 0
    """Samples since step 0."""
    counts: Counts = field(default_factory=Counts)
    skipped: tuple[dict[str, Any], ...] = ()
    """Row groups passed over because they could not be read."""

    @property
    def positions(self) -> Mapping[str, DataPosition]:
        """Of each source of a mixture; without one, of the only source: ""."""
        return {"": self.position}

    def metrics(self) -> dict[str, Any]:
        """For a line of the metrics: the place where the next step begins, and what was passed so far."""
        here = self.position.to_dict()
        shuffled = self.position.sample is not None
        keys = ("streaming", "current_position") if shuffled else ("file_name", "row", "token_offset")
        record: dict[str, Any] = {"stream_hash": self.stream_hash, **self.counts._asdict()}
        record["data_position"] = {key: here[key] for key in ("epoch", *keys)}
        if self.skipped:
            record["skipped_row_groups"] = len(self.skipped)
        return record

    def position_dict(self, file_names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """A checkpoint's ``data_position``; ``file_names``: the shards of each source (of one: "")."""
        return self.position.to_dict(file_names[""])

    def state_dict(self, manifests: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """What a checkpoint's ``data_state`` says of this state, with the file list of each source."""
        return {
            "stream_hash": self.stream_hash,
            "samples": self.samples,
            "counts": self.counts._asdict(),
            "skipped": [dict(skip) for skip in self.skipped],
            "manifest": manifests[""],
        }


@dataclass(frozen=True, kw_only=True)
class SourceStep:
    """Tokens of one optimizer step, (samples_per_step, block_size + 1) int32, and the place after them."""

    tokens: np.ndarray
    progress: DataProgress
    sources: np.ndarray | None = None
    """Of a mixture: (samples_per_step,) int32, the number of each sample's source."""
    starts: np.ndarray | None = None
    """(samples_per_step, block_size) bool: the input tokens that begin a document (document attention)."""


class TokenSource(Protocol):
    """The samples of one optimizer step after another, without end."""

    def next_step(self) -> SourceStep: ...

    def close(self) -> None: ...


def chain_hash(stream_hash: str, tokens: np.ndarray) -> str:
    """Carry the stream hash over samples (count, block_size + 1), however they are grouped."""
    digest = bytes.fromhex(stream_hash)
    for sample in np.ascontiguousarray(tokens, dtype="<i4"):
        state = hashlib.blake2b(digest, digest_size=16)
        state.update(sample)
        digest = state.digest()
    return digest.hex()


def refuse_unencodable(document: Document, reason: str, shards: Sequence[Shard], skip_bad: bool) -> None:
    """DataError that names the document, unless it may be skipped."""
    if not skip_bad:
        raise DataError(
            f"the tokenizer cannot encode {shown(shards[document.file_index].path)}, row {document.row}: "
            f"{reason}: give a tokenizer with an unknown token, or --skip-bad-shards to leave such rows out"
        )


def unencodable_skip(document: Document, reason: str, shards: Sequence[Shard]) -> dict[str, Any]:
    """An entry of `DataProgress.skipped`."""
    shard = shards[document.file_index]
    return {
        "epoch": document.epoch,
        "file_name": shard.name,
        "row_group": shard.group_of(document.row),
        "row": document.row,
        "rows": 1,
        "reason": reason,
    }


class TakenSamples(NamedTuple):
    """Samples of one source, in its order."""

    tokens: np.ndarray
    """(count, block_size + 1) int32."""
    starts: np.ndarray | None = None
    """(count, block_size) bool: the input tokens that begin a document (document attention)."""


class SampleSource(Protocol):
    """The samples of one source one after another, without end."""

    @property
    def progress(self) -> DataProgress:
        """The state after the last sample taken. Its ``stream_hash`` is what the source began with."""
        ...

    def take(self, count: int) -> TakenSamples:
        """The next samples."""
        ...

    def close(self) -> None: ...


class SingleSource:
    """The steps of one source."""

    def __init__(self, source: SampleSource, samples_per_step: int) -> None:
        self._source = source
        self._samples_per_step = samples_per_step
        self._stream_hash = source.progress.stream_hash

    def next_step(self) -> SourceStep:
        tokens, starts = self._source.take(self._samples_per_step)
        self._stream_hash = chain_hash(self._stream_hash, tokens)
        progress = replace(self._source.progress, stream_hash=self._stream_hash)
        return SourceStep(tokens=tokens, progress=progress, starts=starts)

    def close(self) -> None:
        self._source.close()


class StreamingSource:
    """Reads, tokenizes and cuts on the fly, from any position on.

    A source of token ids needs ``eos``, which ends the documents in its blocks, and no ``pool``. One of text
    needs the ``pool``, which may serve other sources too; ``batches_ahead`` are encoded before they are
    needed (None: as many as keep the pool busy).
    """

    def __init__(
        self,
        shards: list[Shard],
        pool: EncoderPool | None,
        options: SourceOptions,
        progress: DataProgress,
        batches_ahead: int | None = None,
        *,
        eos: int | None = None,
    ) -> None:
        self._shards = shards
        self._options = options
        self.progress = progress
        self._skipped = list(progress.skipped)
        position = block_position(progress.position)
        reader = DocumentReader(
            shards,
            options.column,
            position,
            options.skip_bad_shards,
            progress.counts,
            self._skipped,
            order=options.order,
            holdout=options.part,
            excluded=options.excluded,
        )
        self._pool = pool
        self._unencodable: list[tuple[Document, str]] = []
        sampler = PackedSampler if options.packing else WindowSampler
        if options.token_column is not None:
            assert eos is not None
            batches = token_batches(iter(reader), position, eos)
            self._sampler: Sampler = sampler(batches, options.block_size, None)
        else:
            assert pool is not None
            batches = self._noting(encoded_documents(iter(reader), pool, batches_ahead))
            self._sampler = sampler(batches, options.block_size, position)

    def _noting(self, batches: Iterator[EncodedBatch]) -> Iterator[EncodedBatch]:
        """The batches; what cannot be encoded in them is an error, or noted with --skip-bad-shards."""
        for batch in batches:
            for mark, reason in batch.unencodable:
                document = Document.from_mark(mark)
                refuse_unencodable(document, reason, self._shards, self._options.skip_bad_shards)
                self._unencodable.append((document, reason))
            yield batch

    def _skips(self, document: Document) -> tuple[dict[str, Any], ...]:
        """What was passed over before ``document``, in order: by the reader, and for want of token ids."""
        skips: list[dict[str, Any]] = []
        read = 0
        for one, reason in self._unencodable:
            if one.counts.documents >= document.counts.documents:
                break
            skips += [*self._skipped[read : one.skips], unencodable_skip(one, reason, self._shards)]
            read = one.skips
        return (*skips, *self._skipped[read : document.skips])

    def take(self, count: int) -> TakenSamples:
        tokens, document, token_offset, starts = self._sampler.take(count)
        self.progress = replace(
            self.progress,
            position=self._position(document, token_offset),
            samples=self.progress.samples + count,
            counts=document.counts,
            skipped=self._skips(document),
        )
        return TakenSamples(tokens, starts if self._options.document_attention else None)

    def _position(self, document: Document, token_offset: int) -> DataPosition:
        position = DataPosition(
            epoch=document.epoch,
            file_index=document.file_index,
            file_name=self._shards[document.file_index].name,
            row=document.row,
            token_offset=token_offset,
            block_size=self._options.block_size,
        )
        return file_position(position)

    def close(self) -> None:
        """End the pool, which others that share it have closed by then or will."""
        if self._pool is not None:
            self._pool.close()
