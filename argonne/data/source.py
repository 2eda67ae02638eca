"""What rank 0 trains on: from options and a checkpoint's data state to the tokens of each optimizer step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from argonne.data.encoder_pool import EncoderPool
from argonne.data.flat_tokens import block_position, file_position
from argonne.data.position import DataPosition
from argonne.data.samplers import PackedSampler, Sampler, WindowSampler
from argonne.data.shards import DEFAULT_TEXT_COLUMN, Shard
from argonne.data.stream import Counts, Document, DocumentReader, encoded_documents
from argonne.data.token_rows import TokenColumn
from argonne.data.token_stream import token_batches
from argonne.data.tokenizer import EncoderRecipe

NO_HASH = "0" * 32
"""The stream hash before the first sample."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Everything that decides the tokens of a step, and how they are made."""

    data_glob: str
    block_size: int
    samples_per_step: int
    """G: sequences of one optimizer step over all data-parallel ranks."""
    text_column: str | None = None
    token_column: str | None = None
    """Column of token ids, "" for flat files; None: the source is text."""
    vocab_size: int | None = None
    """Ids that exist (None: not checked)."""
    streaming: bool = True
    packing: bool = True
    seed: int = 0
    """Of the non-streaming order."""
    num_proc: int = 8
    """Tokenizing workers at most (cut to the CPUs)."""
    trust_remote_code: bool = False
    skip_bad_shards: bool = False
    allow_data_change: bool = False
    document_attention: bool = False
    """Tell where documents begin, too."""
    remote_cache: Path | None = None
    """Where what is read of remote shards is kept (None: nowhere)."""
    cache_dir: Path | None = None
    """Where the shard index and the non-streaming token cache lie."""

    @property
    def column(self) -> str:
        if self.token_column is not None:
            return TokenColumn(self.token_column, self.vocab_size)
        return self.text_column or DEFAULT_TEXT_COLUMN


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


@dataclass(frozen=True, kw_only=True)
class SourceStep:
    """Tokens of one optimizer step, (samples_per_step, block_size + 1) int32, and the place after them."""

    tokens: np.ndarray
    progress: DataProgress
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


class StreamingSource:
    """Reads, tokenizes and cuts on the fly, from any position on."""

    def __init__(
        self, shards: list[Shard], recipe: EncoderRecipe, options: SourceOptions, progress: DataProgress
    ) -> None:
        self._shards = shards
        self._options = options
        self._progress = progress
        self._skipped = list(progress.skipped)
        position = block_position(progress.position)
        reader = DocumentReader(
            shards, options.column, position, options.skip_bad_shards, progress.counts, self._skipped
        )
        self._pool: EncoderPool | None = None
        sampler = PackedSampler if options.packing else WindowSampler
        if options.token_column is not None:
            batches = token_batches(iter(reader), position, int(recipe.tokenizer.eos_token_id))
            self._sampler: Sampler = sampler(batches, options.block_size, None)
        else:
            self._pool = EncoderPool(recipe, options.num_proc)
            batches = encoded_documents(iter(reader), self._pool)
            self._sampler = sampler(batches, options.block_size, position)

    def next_step(self) -> SourceStep:
        count = self._options.samples_per_step
        tokens, document, token_offset, starts = self._sampler.take(count)
        self._progress = DataProgress(
            position=self._position(document, token_offset),
            stream_hash=chain_hash(self._progress.stream_hash, tokens),
            samples=self._progress.samples + count,
            counts=document.counts,
            skipped=tuple(self._skipped[: document.skips]),
        )
        starts_if_asked = starts if self._options.document_attention else None
        return SourceStep(tokens=tokens, progress=self._progress, starts=starts_if_asked)

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
        if self._pool is not None:
            self._pool.close()
