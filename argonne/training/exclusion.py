"""--exclude-documents around a run: the last checkpoint before a document, lists kept beside the metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from argonne.config.options import RunConfig
from argonne.errors import CheckpointError, DataError
from argonne.files import OutputFolder
from argonne.training.data_places import metadata_for
from checkpointing import own_checkpoints, saved_metadata
from data_stream import (
    Exclusion,
    OpenedStream,
    ReadBeforeError,
    SourceOptions,
    open_stream,
    read_before,
)


def open_at(
    options: SourceOptions, tokenizer: Any, place: Mapping[str, Any], step: int, config: RunConfig
) -> OpenedStream:
    """Rank 0's source at the place in ``place``.

    DataError with the last kept checkpoint from before, where an excluded document was trained on.
    """
    try:
        return open_stream(
            options,
            tokenizer,
            saved_position=place.get("data_position"),
            saved_state=place.get("data_state"),
            global_step=step,
        )
    except ReadBeforeError as error:
        folder = OutputFolder(Path(config.output.output_dir))
        found = last_before(folder, [(config, options)], tokenizer) if folder.pretrained.is_dir() else None
        if found is None:
            raise DataError(
                f"{error.fault}, and no checkpoint in {folder.pretrained} is from before: start anew with "
                "the list, or --allow-data-change to leave it out from here on"
            ) from error
        raise DataError(
            f"{error.fault}; the last checkpoint that had not seen it is {found[1]}: branch off from it "
            f"(scripts/branch_run.py {folder.root} NEW --step {found[0]} --exclude-documents "
            f"{config.data.exclude_documents}), or --allow-data-change to leave it out from here on"
        ) from error


def last_before(
    folder: OutputFolder, stages: Iterable[tuple[RunConfig, SourceOptions]], tokenizer: Any
) -> tuple[int, Path] | None:
    """(step, path) of the newest kept checkpoint that had seen no document that is newly excluded, or None.

    A checkpoint that cannot be read, or whose data is not that of the stages, is passed over.
    """
    stages = list(stages)
    for step, path in own_checkpoints(folder.pretrained):
        try:
            if first_read(path, step, stages, tokenizer) is None:
                return step, path
        except (CheckpointError, DataError):
            continue
    return None


def first_read(
    path: Path, step: int, stages: Iterable[tuple[RunConfig, SourceOptions]], tokenizer: Any
) -> str | None:
    """The first newly excluded document that a checkpoint had seen, in words, or None.

    Raises CheckpointError, and DataError where its data is not that of the stages.
    """
    metadata = saved_metadata(path)
    found = (_first_read(metadata, config, options, tokenizer, step) for config, options in stages)
    return next((one for one in found if one is not None), None)


def _first_read(
    metadata: Mapping[str, Any], config: RunConfig, options: SourceOptions, tokenizer: Any, step: int
) -> str | None:
    own = metadata.get("data_source")
    place = metadata_for(config, metadata, new_stage=own is not None)
    if place.get("data_position") is None:
        return None
    return read_before(
        replace(options, allow_data_change=False),
        tokenizer,
        saved_position=place["data_position"],
        saved_state=place.get("data_state"),
        global_step=step,
    )


def kept_list(folder: OutputFolder, digest: str) -> Path | None:
    """The file of a list that the metrics name; None for "", which is none.

    Raises DataError where it is gone.
    """
    if not digest:
        return None
    path = folder.excluded(digest)
    if not path.is_file():
        raise DataError(f"{path} is missing, the list of excluded documents of that time: restore it")
    return path


def kept_exclusion(folder: OutputFolder, digest: str) -> Exclusion:
    """As `kept_list`, the list itself."""
    path = kept_list(folder, digest)
    return Exclusion() if path is None else Exclusion.read(path)
