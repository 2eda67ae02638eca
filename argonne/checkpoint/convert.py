"""Rewriting a checkpoint, one tensor at a time, for this suite or for the pipeline scripts.

Whatever :func:`argonne.checkpoint.parts.open_any` opens can be written: a whole file, stages, ranks' slices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from argonne.checkpoint.archive import ArchiveWriter, tensor_bytes
from argonne.checkpoint.commit import commit, failure_reason, temporary_file
from argonne.checkpoint.contents import (
    TensorEntry,
    begin_archive,
    build_tree,
    finish_archive,
    tensor_entries,
)
from argonne.checkpoint.finite import require_finite
from argonne.checkpoint.reader import FORMAT_KEY, FORMAT_VERSION, KIND_FAMILY, CheckpointReader
from argonne.checkpoint.rows import row_chunks
from argonne.checkpoint.tensor_file import TensorSource, read_rectangle
from argonne.errors import CheckpointError

PIPELINE_KEYS = ("global_step", "tokens_processed", "scheduler_state_dict", "loss", "data_position")
_SLACK_BYTES = 4 << 20


def write_converted(
    reader: CheckpointReader,
    path: Path,
    *,
    model_config: Mapping[str, Any] | None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Write a checkpoint as one whole file; return its bytes.

    With ``model_config`` the file is this suite's (float32); without, it is a pipeline script's, its weights
    in ``dtype`` (Adam state stays float32). Optimizer state goes along where there is any. The new file
    appears whole or not at all. Raises CheckpointError where it cannot be written or a value is not finite.
    """
    if model_config is not None:
        metadata = dict(reader.metadata)
        metadata.pop("fused_optimizer", None)
        metadata["model_config"] = dict(model_config)
        dtype = torch.float32
        metadata.setdefault("model_dtype", str(dtype))  # what the run trained in, where the file says so
    else:
        metadata = {key: reader.metadata[key] for key in PIPELINE_KEYS if key in reader.metadata}
        metadata |= {"fused_optimizer": False, "model_dtype": str(dtype)}
    metadata.setdefault("global_step", 0)
    if reader.kind == KIND_FAMILY:  # another reader's position, another scheduler's state
        metadata.pop("data_position", None)
        metadata.pop("scheduler_state_dict", None)
    names = reader.names
    entries = tensor_entries({name: reader.shape(name) for name in names}, with_adam=bool(reader.adam))
    options = dict(reader.param_groups[0]) if reader.param_groups else {}
    tree = build_tree(entries, options, metadata, tied=reader.tied, weight_dtype=dtype)
    tree.pop(FORMAT_KEY, None)
    if model_config is not None:
        tree[FORMAT_KEY] = FORMAT_VERSION
    width = {"param": dtype.itemsize}
    need = sum(math.prod(entry.shape) * width.get(entry.key, 4) for entry in entries) + _SLACK_BYTES
    try:
        with temporary_file(path, need) as (descriptor, temporary):
            size = _stream(descriptor, tree, reader, entries, dtype)
            commit(descriptor, temporary, path, size)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {failure_reason(error, path.parent, need)}"
        ) from error
    return size


def _stream(
    descriptor: int,
    tree: dict[str, Any],
    reader: CheckpointReader,
    entries: list[TensorEntry],
    dtype: torch.dtype,
) -> int:
    writer = ArchiveWriter(descriptor)
    try:
        begin_archive(writer, tree)
        for index, entry in enumerate(entries):
            target = dtype if entry.key == "param" else torch.float32
            writer.begin(f"data/{index}", math.prod(entry.shape) * target.itemsize)
            for chunk in row_parts(reader.source(entry.name, entry.key), target):
                require_finite(chunk, entry.label)
                writer.write(tensor_bytes(chunk))
        for index, name in enumerate(reader.names if reader.adam else ()):
            step = torch.tensor(reader.adam_step(name), dtype=torch.float32)
            writer.add(f"data/step_{index}", bytes(tensor_bytes(step)))
        return finish_archive(writer)
    finally:
        writer.abandon()


def row_parts(source: TensorSource, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A tensor in chunks of rows, converted to ``dtype``."""
    shape = source.shape
    for first, last in row_chunks(shape):
        start = (first, *(0 for _ in shape[1:]))
        yield read_rectangle(source, start, (last - first, *shape[1:]), dtype)
