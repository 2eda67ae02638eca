"""Build rank 0's source from options and a checkpoint: is it the checkpoint's data, and where in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from argonne.data.documents import Counts
from argonne.data.feed import StepBatch, StepFeed
from argonne.data.find_shards import natural_key, shown
from argonne.data.position import DataPosition
from argonne.data.shards import (
    Shard,
    current_names,
    manifest,
    manifest_difference,
    open_corpus,
    renamed,
    touched,
)
from argonne.data.source import DataProgress, SourceOptions, StreamingSource, TokenSource
from argonne.data.token_cache import CachedSource
from argonne.data.tokenizer import EncoderRecipe, load_tokenizer, tokenizer_fingerprint
from argonne.errors import DataError

__all__ = [
    "DataPosition",
    "DataProgress",
    "OpenedStream",
    "SourceOptions",
    "StepBatch",
    "StepFeed",
    "load_tokenizer",
    "open_stream",
]

MUST_MATCH = {
    "tokenizer": "the tokenizer (--tokenizer-path)",
    "text_column": "--text-column",
    "streaming": "streaming (--no-streaming turns it off)",
}
MUST_MATCH_SHUFFLED = {
    "seed": "--seed",
    "block_size": "--block-size",
    "packing": "packing (--no-packing turns it off)",
}
"""A place in the shuffled order means something only with these."""
MAY_CHANGE = {
    "samples_per_step": "the global batch (sequences a step)",
    "block_size": "--block-size",
    "packing": "packing (--no-packing turns it off)",
}


@dataclass(frozen=True, kw_only=True)
class OpenedStream:
    """A source with what the entry prints and keeps of it."""

    source: TokenSource
    shards: list[Shard]
    identity: dict[str, Any]
    notices: tuple[str, ...]
    """Warnings for the console, each once."""
    start: DataProgress
    """Where the stream stands before the first step of this run."""

    @cached_property
    def _names(self) -> list[str]:
        return [shard.name for shard in self.shards]

    def position_dict(self, progress: DataProgress) -> dict[str, Any]:
        """A checkpoint's ``data_position``."""
        return progress.position.to_dict(self._names)

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


def open_stream(
    options: SourceOptions,
    tokenizer: Any,
    *,
    saved_position: Mapping[str, Any] | None = None,
    saved_state: Mapping[str, Any] | None = None,
    global_step: int = 0,
) -> OpenedStream:
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
    notices = shard_notices(shards, options)
    identity = source_identity(options, tokenizer)
    progress = DataProgress(position=_start(shards, options))
    names: dict[str, str] = {}
    if saved_state is not None:
        names = current_names(saved_state["manifest"], shards)
        saved_state = {**saved_state, "manifest": renamed(saved_state["manifest"], shards)}
        notices += touched_notices(saved_state, shards)
        notices += check_state(saved_state, identity, shards, options.allow_data_change)
        progress = restored_progress(saved_state, progress.position)
    if saved_position is not None:
        position = DataPosition.from_dict(
            saved_position, block_size=options.block_size, global_step=global_step
        )
        position = replace(position, file_name=names.get(position.file_name, position.file_name))
        position, remarks = place(position, shards, options, shuffle_known=saved_state is not None)
        progress = replace(progress, position=position)
        notices += remarks
    recipe = EncoderRecipe(tokenizer=tokenizer, trust_remote_code=options.trust_remote_code)
    source: TokenSource
    if options.streaming:
        source = StreamingSource(shards, recipe, options, progress)
    else:
        source = CachedSource(shards, recipe, identity["tokenizer"], options, progress)
    return OpenedStream(
        source=source, shards=shards, identity=identity, notices=tuple(notices), start=progress
    )


def shard_notices(shards: Sequence[Shard], options: SourceOptions) -> list[str]:
    """Warnings of shards that are skipped, or hold no text."""
    bad = [shard for shard in shards if shard.fault]
    notices = [f"skipping the bad shard {shown(shard.path)}: {shard.fault}" for shard in bad]
    empty = [shard.name for shard in shards if 0 < shard.rows == shard.null_rows]
    if empty:
        notices.append(f"without any text in {options.text_column!r} (--text-column): {', '.join(empty)}")
    return notices


def touched_notices(saved: Mapping[str, Any], shards: Sequence[Shard]) -> list[str]:
    """A warning of large shards whose modification time alone differs from the checkpoint's."""
    names = touched(saved["manifest"], shards)
    if not names:
        return []
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [
        f"{len(names)} shards have another modification time than in the checkpoint, and the same size and "
        f"sampled content: {listed}"
    ]


def source_identity(options: SourceOptions, tokenizer: Any) -> dict[str, Any]:
    """What a checkpoint keeps to recognise its data by, beside the file list."""
    return {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "text_column": options.text_column,
        "packing": options.packing,
        "streaming": options.streaming,
        "block_size": options.block_size,
        "samples_per_step": options.samples_per_step,
        "seed": options.seed,
    }


def _start(shards: Sequence[Shard], options: SourceOptions) -> DataPosition:
    if not options.streaming:
        return DataPosition(sample=0, block_size=options.block_size)
    return DataPosition(file_name=shards[0].name, block_size=options.block_size)


def check_state(
    saved: Mapping[str, Any], identity: Mapping[str, Any], shards: Sequence[Shard], allow_data_change: bool
) -> list[str]:
    """Compare a checkpoint's data state with today's; DataError names both values and the way out.

    Returns the differences that the run survives.
    """
    streaming = identity["streaming"]
    refused = MUST_MATCH if streaming else MUST_MATCH | MUST_MATCH_SHUFFLED
    differences = [
        f"{what} was {saved[key]}, is {identity[key]}"
        for key, what in refused.items()
        if saved[key] != identity[key]
    ]
    change = manifest_difference(saved["manifest"], shards)
    if not streaming and not change and len(shards) != len(saved["manifest"]["names"]):
        change = f"added at the end, which changes the shuffled order: {len(shards)} shards now"
    if change:
        differences.append(f"shards {change}")
    if differences and not allow_data_change:
        raise DataError(
            f"the data is not the checkpoint's: {'; '.join(differences)}: "
            "restore it, or --allow-data-change to go on all the same"
        )
    survived = [
        f"{what} was {saved[key]} in the checkpoint, is {identity[key]}"
        for key, what in MAY_CHANGE.items()
        if saved[key] != identity[key] and key not in refused
    ]
    return [f"the data is not the checkpoint's: {difference}" for difference in differences] + survived


def restored_progress(saved: Mapping[str, Any], position: DataPosition) -> DataProgress:
    """The hash and the counts of a checkpoint's ``data_state``."""
    return DataProgress(
        position=position,
        stream_hash=str(saved["stream_hash"]),
        samples=int(saved["samples"]),
        counts=Counts(**saved["counts"]),
        skipped=tuple(dict(skip) for skip in saved["skipped"]),
    )


def place(
    position: DataPosition, shards: Sequence[Shard], options: SourceOptions, *, shuffle_known: bool
) -> tuple[DataPosition, list[str]]:
    """Find a saved position among today's shards; returns it with remarks for the console.

    ``shuffle_known``: a non-streaming position is of our own order, not of a pipeline script's.
    """
    if options.streaming == (position.sample is not None):
        was = "non-streaming" if options.streaming else "streaming"
        remedy = "give --no-streaming" if options.streaming else "leave --no-streaming out"
        message = f"the checkpoint's data position is a {was} one"
        if not options.allow_data_change:
            raise DataError(f"{message}: {remedy}, or --allow-data-change to begin the data anew")
        return _start(shards, options), [f"{message}: the data begins anew"]
    if position.sample is not None:
        remark = (
            "the checkpoint's shuffled order was not saved: its count of samples goes on in our own order"
        )
        return position, [] if shuffle_known else [remark]
    names = [shard.name for shard in shards]
    if not position.file_name:
        if position.file_index >= len(shards):
            raise DataError(
                f"the checkpoint stands in shard number {position.file_index} (from 0), --data-glob gives "
                f"{len(shards)}: give the corpus it was trained on"
            )
        return replace(position, file_name=names[position.file_index]), []
    if position.file_name in names:
        return replace(position, file_index=names.index(position.file_name)), []
    return _after_missing(position, names, options)


def _after_missing(
    position: DataPosition, names: list[str], options: SourceOptions
) -> tuple[DataPosition, list[str]]:
    gone = f"the data position is in shard {position.file_name!r}, which --data-glob does not give"
    if not options.allow_data_change:
        raise DataError(f"{gone}: restore it, or --allow-data-change to go on with the next one")
    key = natural_key(position.file_name)
    index = next((index for index, name in enumerate(names) if natural_key(name) > key), None)
    epoch, index = (position.epoch + 1, 0) if index is None else (position.epoch, index)
    found = DataPosition(epoch=epoch, file_index=index, file_name=names[index], block_size=options.block_size)
    return found, [f"{gone}: going on with {names[index]!r}"]
