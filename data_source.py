"""What rank 0 trains on: from options and a checkpoint's data state to the tokens of each optimizer step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_shards import DEFAULT_TEXT_COLUMN, Shard, manifest, manifest_difference, natural_key, open_corpus
from data_stream import (
    Counts,
    DataPosition,
    Document,
    DocumentReader,
    PackedSampler,
    Sampler,
    WindowSampler,
    encoded_documents,
)
from data_tokenize import EncoderPool, EncoderRecipe, tokenizer_fingerprint
from run_errors import DataError

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
    streaming: bool = True
    packing: bool = True
    seed: int = 0
    """Of the non-streaming order."""
    num_proc: int = 8
    """Tokenizing workers at most (cut to the CPUs)."""
    trust_remote_code: bool = False
    skip_bad_shards: bool = False
    allow_data_change: bool = False
    cache_dir: Path | None = None
    """Where the shard index and the non-streaming token cache lie."""

    @property
    def column(self) -> str:
        return self.text_column or DEFAULT_TEXT_COLUMN


@dataclass(frozen=True, kw_only=True)
class DataProgress:
    """The state of the stream after the last sample of a step; what a checkpoint needs besides the options."""

    position: DataPosition
    stream_hash: str = NO_HASH
    """h(i+1) = blake2b(h(i) + the sample's block_size + 1 ids as little-endian int32), 16 bytes, in hex."""
    samples: int = 0
    """Samples since step 0."""
    counts: Counts = Counts()
    skipped: tuple[dict[str, Any], ...] = ()
    """Row groups passed over because they could not be read."""


@dataclass(frozen=True, kw_only=True)
class SourceStep:
    """The tokens of one optimizer step, (samples_per_step, block_size + 1) int32, and the place after them."""

    tokens: np.ndarray
    progress: DataProgress


class TokenSource(Protocol):
    """The samples of one optimizer step after another, without end."""

    def next_step(self) -> SourceStep: ...

    def close(self) -> None: ...


def chain_hash(stream_hash: str, tokens: np.ndarray) -> str:
    """Carry the stream hash over the samples of ``tokens``, (count, block_size + 1), however they are grouped."""
    digest = bytes.fromhex(stream_hash)
    for sample in tokens:
        digest = hashlib.blake2b(digest + sample.astype("<i4").tobytes(), digest_size=16).digest()
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
        position = progress.position
        reader = DocumentReader(
            shards, options.column, position, options.skip_bad_shards, progress.counts, self._skipped
        )
        self._pool = EncoderPool(recipe, options.num_proc)
        batches = encoded_documents(iter(reader), self._pool)
        sampler = PackedSampler if options.packing else WindowSampler
        self._sampler: Sampler = sampler(batches, options.block_size, position.token_offset)

    def next_step(self) -> SourceStep:
        count = self._options.samples_per_step
        tokens, document, token_offset = self._sampler.take(count)
        self._progress = DataProgress(
            position=self._position(document, token_offset),
            stream_hash=chain_hash(self._progress.stream_hash, tokens),
            samples=self._progress.samples + count,
            counts=document.counts,
            skipped=tuple(self._skipped[: document.skips]),
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


def open_source(
    options: SourceOptions,
    tokenizer: Any,
    *,
    saved_position: Mapping[str, Any] | None = None,
    saved_state: Mapping[str, Any] | None = None,
    global_step: int = 0,
) -> OpenedSource:
    """Check the corpus and build rank 0's source, from the start or from a checkpoint's place.

    ``saved_position`` is a checkpoint's ``data_position`` (ours or a pipeline script's), ``saved_state`` its
    ``data_state`` (None in a pipeline checkpoint). Raises DataError before anything is tokenized.
    """
    shards = open_corpus(
        options.data_glob,
        options.text_column,
        skip_bad_shards=options.skip_bad_shards,
        cache_dir=options.cache_dir,
    )
    identity = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "text_column": options.column,
        "packing": options.packing,
        "streaming": options.streaming,
        "block_size": options.block_size,
        "samples_per_step": options.samples_per_step,
        "seed": options.seed,
    }
    notices: list[str] = []
    progress = DataProgress(position=DataPosition(block_size=options.block_size, sample=None))
    if saved_state is not None:
        check_state(saved_state, identity, shards, options.allow_data_change, notices)
        progress = restored_progress(saved_state, progress.position)
    if saved_position is not None:
        position = DataPosition.from_dict(
            saved_position, block_size=options.block_size, global_step=global_step
        )
        position = place(position, shards, options, notices)
        progress = replace(progress, position=position)
    bad = [shard for shard in shards if shard.fault]
    notices.extend(f"skipping the bad shard {shard.path}: {shard.fault}" for shard in bad)
    recipe = EncoderRecipe(tokenizer=tokenizer, trust_remote_code=options.trust_remote_code)
    source = StreamingSource(shards, recipe, options, progress)
    return OpenedSource(
        source=source, shards=shards, identity=identity, notices=tuple(notices), start=progress
    )


def check_state(
    saved: Mapping[str, Any],
    identity: Mapping[str, Any],
    shards: Sequence[Shard],
    allow_data_change: bool,
    notices: list[str],
) -> None:
    """Compare a checkpoint's data state with today's; DataError names both values and the way out."""
    differences = []
    for key, what in REFUSED.items():
        if saved[key] != identity[key]:
            differences.append(f"{what} was {saved[key]}, is {identity[key]}")
    if not identity["streaming"]:
        for key in ("seed", "block_size", "packing"):
            if saved[key] != identity[key]:
                differences.append(
                    f"--{key.replace('_', '-')} of the shuffled order was {saved[key]}, is {identity[key]}"
                )
    change = manifest_difference(saved["manifest"], shards)
    if change:
        differences.append(f"shards {change}")
    if differences and not allow_data_change:
        raise DataError(
            f"the data is not the checkpoint's: {'; '.join(differences)}: restore it, or --allow-data-change to go on"
        )
    notices.extend(f"the data is not the checkpoint's: {difference}" for difference in differences)
    for key, what in NOTICED.items():
        if saved[key] != identity[key] and (key != "block_size" or identity["streaming"]):
            notices.append(f"{what} was {saved[key]} in the checkpoint, is {identity[key]}")


REFUSED = {
    "tokenizer": "the tokenizer (--tokenizer-path)",
    "text_column": "--text-column",
    "streaming": "streaming",
}
NOTICED = {
    "samples_per_step": "the global batch (sequences a step)",
    "block_size": "--block-size",
    "packing": "packing",
}


def restored_progress(saved: Mapping[str, Any], position: DataPosition) -> DataProgress:
    return DataProgress(
        position=position,
        stream_hash=str(saved["stream_hash"]),
        samples=int(saved["samples"]),
        counts=Counts(**saved["counts"]),
        skipped=tuple(dict(skip) for skip in saved["skipped"]),
    )


def place(
    position: DataPosition, shards: Sequence[Shard], options: SourceOptions, notices: list[str]
) -> DataPosition:
    """Find a saved position among today's shards."""
    if position.sample is not None:
        raise DataError("the checkpoint's data position is a non-streaming one: give --no-streaming")
    names = [shard.name for shard in shards]
    if not position.file_name:
        if position.file_index >= len(shards):
            raise DataError(
                f"the checkpoint stands in shard {position.file_index} (from 0), --data-glob gives {len(shards)}: "
                "give the corpus it was trained on"
            )
        return replace(position, file_name=names[position.file_index])
    if position.file_name in names:
        return replace(position, file_index=names.index(position.file_name))
    if not options.allow_data_change:
        raise DataError(
            f"the checkpoint stands in shard {position.file_name!r}, which --data-glob does not give: restore it, "
            "or --allow-data-change to go on with the next one"
        )
    later = [index for index, name in enumerate(names) if natural_key(name) > natural_key(position.file_name)]
    index = later[0] if later else 0
    notices.append(f"shard {position.file_name!r} is gone: going on with {names[index]!r}")
    epoch = position.epoch if later else position.epoch + 1
    return DataPosition(epoch=epoch, file_index=index, file_name=names[index], block_size=position.block_size)


@dataclass(frozen=True, kw_only=True)
class OpenedSource:
    """A source with what the entry prints and keeps of it."""

    source: TokenSource
    shards: list[Shard]
    identity: dict[str, Any]
    notices: tuple[str, ...]
    """Warnings for the console, each once."""
    start: DataProgress

    def position_dict(self, progress: DataProgress) -> dict[str, Any]:
        """A checkpoint's ``data_position``."""
        return progress.position.to_dict([shard.name for shard in self.shards])

    def state_dict(self, progress: DataProgress) -> dict[str, Any]:
        """A checkpoint's ``data_state``: plain containers."""
        return {
            **self.identity,
            "stream_hash": progress.stream_hash,
            "samples": progress.samples,
            "counts": progress.counts._asdict(),
            "skipped": [dict(skip) for skip in progress.skipped],
            "manifest": manifest(self.shards),
        }
