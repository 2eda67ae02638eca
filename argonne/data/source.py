"""What rank 0 trains on: from options and a checkpoint's data state to the tokens of each optimizer step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from argonne.data.documents import Counts, Document, DocumentReader
from argonne.data.encoder_pool import EncoderPool
from argonne.data.find_shards import shown
from argonne.data.position import DataPosition
from argonne.data.samplers import PackedSampler, Sampler, WindowSampler
from argonne.data.shards import Shard
from argonne.data.stream import EncodedBatch, encoded_documents
from argonne.data.tokenizer import EncoderRecipe
from argonne.errors import DataError

NO_HASH = "0" * 32
"""The stream hash before the first sample."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Everything that decides the tokens of a step, and how they are made; the flags have the defaults."""

    data_glob: str | Sequence[str]
    """Pattern, file or folder, or several of them."""
    block_size: int
    samples_per_step: int
    """G: sequences of one optimizer step over all data-parallel ranks."""
    text_column: str
    streaming: bool
    packing: bool
    seed: int
    """Of the non-streaming order."""
    num_proc: int
    """Tokenizing workers at most (cut to the CPUs)."""
    trust_remote_code: bool
    skip_bad_shards: bool
    allow_data_change: bool
    cache_dir: Path | None
    """Where the shard index and the non-streaming token cache lie."""


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


class StreamingSource:
    """Reads, tokenizes and cuts on the fly, from any position on."""

    def __init__(
        self, shards: list[Shard], recipe: EncoderRecipe, options: SourceOptions, progress: DataProgress
    ) -> None:
        self._shards = shards
        self._options = options
        self._progress = progress
        self._skipped = list(progress.skipped)
        position = progress.position
        reader = DocumentReader(
            shards, options.text_column, position, options.skip_bad_shards, progress.counts, self._skipped
        )
        self._pool = EncoderPool(recipe, options.num_proc)
        self._unencodable: list[tuple[Document, str]] = []
        batches = self._noting(encoded_documents(iter(reader), self._pool))
        sampler = PackedSampler if options.packing else WindowSampler
        self._sampler: Sampler = sampler(batches, options.block_size, position)

    def _noting(self, batches: Iterator[EncodedBatch]) -> Iterator[EncodedBatch]:
        """The batches; what cannot be encoded in them is an error, or noted with --skip-bad-shards."""
        for batch in batches:
            for mark, reason in batch.unencodable:
                document = Document.from_mark(mark)
                refuse_unencodable(document, reason, self._shards, self._options.skip_bad_shards)
                self._unencodable.append((document, reason))
            yield batch

    def _skips(self, document: Document) -> tuple[dict[str, Any], ...]:
        """What was passed over before ``document``: by the reader, and for want of token ids."""
        read = self._skipped[: document.skips]
        passed = document.counts.documents
        texts = [
            unencodable_skip(one, reason, self._shards)
            for one, reason in self._unencodable
            if one.counts.documents < passed
        ]
        return (*read, *texts)

    def next_step(self) -> SourceStep:
        count = self._options.samples_per_step
        tokens, document, token_offset = self._sampler.take(count)
        self._progress = DataProgress(
            position=self._position(document, token_offset),
            stream_hash=chain_hash(self._progress.stream_hash, tokens),
            samples=self._progress.samples + count,
            counts=document.counts,
            skipped=self._skips(document),
        )
        return SourceStep(tokens=tokens, progress=self._progress)

    def _position(self, document: Document, token_offset: int) -> DataPosition:
        return DataPosition(
            epoch=document.epoch,
            file_index=document.file_index,
            file_name=self._shards[document.file_index].name,
            row=document.row,
            token_offset=token_offset,
            block_size=self._options.block_size,
        )

    def close(self) -> None:
        self._pool.close()
