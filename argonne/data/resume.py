"""Is today's data the checkpoint's, and where in it does the stream resume: one source at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from argonne.data.documents import Counts
from argonne.data.find_shards import natural_key
from argonne.data.flat_tokens import file_position
from argonne.data.position import DataPosition
from argonne.data.shards import Shard, current_names, manifest_difference, renamed, touched
from argonne.data.source import DataProgress, SourceOptions
from argonne.data.token_rows import describe_column
from argonne.data.tokenizer import tokenizer_fingerprint
from argonne.errors import DataError

MUST_MATCH = {
    "tokenizer": "the tokenizer (--tokenizer-path)",
    "text_column": "the column (--text-column, --token-column)",
    "streaming": "streaming (--no-streaming turns it off)",
    "shuffle": "--shuffle",
    "holdout": "--holdout",
}
MUST_MATCH_SHUFFLED = {"seed": "--seed"}
"""A place in a shuffled order means something only with these; in the non-streaming one also with those:"""
MUST_MATCH_CACHED = {
    **MUST_MATCH_SHUFFLED,
    "block_size": "--block-size",
    "packing": "packing (--no-packing turns it off)",
}
MAY_CHANGE = {
    "samples_per_step": "the global batch (sequences a step)",
    "block_size": "--block-size",
    "packing": "packing (--no-packing turns it off)",
    "document_attention": "--document-attention",
}
BEFORE = {"shuffle": False, "holdout": None, "document_attention": False}
"""What checkpoints without these keys were trained with."""


def source_identity(options: SourceOptions, tokenizer: Any) -> dict[str, Any]:
    """What a checkpoint keeps to recognise its data by, beside the file list."""
    return {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "text_column": describe_column(options.column),
        "token_column": options.token_column,
        "packing": options.packing,
        "streaming": options.streaming,
        "block_size": options.block_size,
        "samples_per_step": options.samples_per_step,
        "seed": options.seed,
        "shuffle": options.shuffle,
        "holdout": options.holdout,
        "document_attention": options.document_attention,
    }


def _start(shards: Sequence[Shard], options: SourceOptions, epoch: int = 0) -> DataPosition:
    """The beginning of an epoch."""
    if not options.streaming:
        return DataPosition(epoch=epoch, sample=0, block_size=options.block_size)
    index, row = options.order.first(epoch, shards)
    name = shards[index].name
    first = DataPosition(
        epoch=epoch, file_index=index, file_name=name, row=row, block_size=options.block_size
    )
    return file_position(first)


def check_identity(
    saved: Mapping[str, Any], identity: Mapping[str, Any], allow_data_change: bool
) -> list[str]:
    """Compare what a checkpoint's data was read with; DataError names both values and the way out.

    Returns the differences that the run survives.
    """
    refused = dict(MUST_MATCH)
    if not identity["streaming"]:
        refused |= MUST_MATCH_CACHED
    elif identity["shuffle"]:
        refused |= MUST_MATCH_SHUFFLED
    differences = [
        f"{what} was {_saved(saved, key)}, is {identity[key]}"
        for key, what in refused.items()
        if _saved(saved, key) != identity[key]
    ]
    survived = [
        f"{what} was {_saved(saved, key)} in the checkpoint, is {identity[key]}"
        for key, what in MAY_CHANGE.items()
        if _saved(saved, key) != identity[key] and key not in refused
    ]
    return _survived(differences, allow_data_change) + survived


def _saved(saved: Mapping[str, Any], key: str) -> Any:
    return saved.get(key, BEFORE[key]) if key in BEFORE else saved[key]


def _survived(differences: Sequence[str], allow_data_change: bool) -> list[str]:
    """The differences as warnings; DataError where they were not allowed."""
    if differences and not allow_data_change:
        raise DataError(
            f"the data is not the checkpoint's: {'; '.join(differences)}: "
            "restore it, or --allow-data-change to go on all the same"
        )
    return [f"the data is not the checkpoint's: {difference}" for difference in differences]


def resume(
    options: SourceOptions,
    shards: list[Shard],
    saved_position: Mapping[str, Any] | None,
    saved_state: Mapping[str, Any] | None,
    global_step: int,
) -> tuple[DataProgress, list[str]]:
    """One source at its saved place, or at its start; with remarks for the console."""
    progress, another_order = DataProgress(position=_start(shards, options)), False
    notices: list[str] = []
    names: dict[str, str] = {}
    if saved_state is not None:
        names = current_names(saved_state["manifest"], shards)
        saved_state = {**saved_state, "manifest": renamed(saved_state["manifest"], shards)}
        notices += touched_notices(saved_state, shards)
        change = manifest_difference(saved_state["manifest"], shards)
        ordered = options.shuffle or not options.streaming
        if ordered and not change and len(shards) != len(saved_state["manifest"]["names"]):
            change = f"added at the end, which changes the shuffled order: {len(shards)} shards now"
        notices += _survived([f"shards {change}"] if change else [], options.allow_data_change)
        progress = restored_progress(saved_state, progress.position)
        another_order = _saved(saved_state, "shuffle") != options.shuffle or (
            options.shuffle and (bool(change) or saved_state["seed"] != options.seed)
        )
    if saved_position is None:
        return progress, notices
    position = DataPosition.from_dict(saved_position, block_size=options.block_size, global_step=global_step)
    position = replace(position, file_name=names.get(position.file_name, position.file_name))
    foreign = options.shuffle and position.sample is None and "token_offset" not in saved_position
    if options.streaming and (another_order or foreign):
        epoch = position.epoch + 1
        notices.append(f"the order of epoch {position.epoch} is not the checkpoint's: epoch {epoch} begins")
        return replace(progress, position=_start(shards, options, epoch)), notices
    position, remarks = place(position, shards, options, shuffle_known=saved_state is not None)
    return replace(progress, position=position), notices + remarks


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
