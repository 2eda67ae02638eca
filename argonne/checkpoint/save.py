"""Saving: rank 0 streams the unsharded model and its Adam state into one file, the others send their slices.

Nothing is gathered whole. A parameter travels in chunks of rows: rank 0 receives the rectangles that each
rank owns of a chunk, assembles it, writes it and forgets it. Before each tensor rank 0 sends every rank a
word, go or stop; where it cannot go on (disk full, a value that is not finite) it receives the rest of the
tensor under way, says stop with the reason, and all ranks raise the same CheckpointError.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from argonne.checkpoint.archive import ArchiveWriter, tensor_bytes
from argonne.checkpoint.commit import commit, failure_reason, temporary_file
from argonne.checkpoint.contents import (
    Adam,
    TensorEntry,
    begin_archive,
    build_tree,
    estimate_checkpoint_bytes,
    finish_archive,
    tensor_entries,
)
from argonne.checkpoint.reader import FORMAT_KEY, FORMAT_VERSION
from argonne.checkpoint.transfer import SlicePeers, gather_tensor, send_slices
from argonne.errors import CheckpointError
from argonne.tp.slices import SliceMap


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """What a save wrote (rank 0)."""

    path: Path
    size: int
    """Bytes of the file."""
    seconds: float
    """From the call to the durable rename."""


def save_checkpoint(
    path: Path,
    *,
    slice_map: SliceMap,
    rank: int,
    parameters: Mapping[str, torch.Tensor],
    adam: Adam,
    param_group: Mapping[str, Any],
    metadata: Mapping[str, Any],
    tied: bool,
    control_group: dist.ProcessGroup | None,
    spare_bytes: int = 0,
) -> SaveReport | None:
    """Write one whole checkpoint; collective over ``control_group`` (gloo, all ranks).

    ``parameters`` are this rank's local tensors by unsharded name; ``adam[name]`` holds ``step``,
    ``exp_avg`` and ``exp_avg_sq``, or ``adam`` is empty on every rank before the first step.
    ``param_group`` gives the optimizer's options (lr, betas, eps, weight_decay; what is left out takes
    AdamW's default). ``metadata`` holds the other keys of the file, plain containers and numbers.
    ``spare_bytes`` must remain free on the disk beside the new file.

    Returns a report on rank 0 and None elsewhere. Raises the same CheckpointError on all ranks when the
    file could not be written whole (the temporary file is gone then and the folder as it was), PeerError
    where a rank left.
    """
    entries = tensor_entries({name: slice_map.shape(name) for name in slice_map.names}, with_adam=bool(adam))
    if rank != 0:
        send_slices(entries, slice_map, rank, parameters, adam, control_group)
        return None
    peers = SlicePeers(range(1, slice_map.world_size), control_group)
    started = time.monotonic()
    need = estimate_checkpoint_bytes(slice_map, with_adam=bool(adam)) + spare_bytes
    try:
        tree = build_tree(entries, param_group, metadata, tied=tied)
        tree[FORMAT_KEY] = FORMAT_VERSION
        with temporary_file(path, need) as (descriptor, temporary):
            size = _stream(descriptor, tree, entries, slice_map, parameters, adam, peers)
            commit(descriptor, temporary, path, size)
    except OSError as error:
        message = f"checkpoint {path} could not be written: {failure_reason(error, path.parent, need)}"
        peers.stop(message)
        raise CheckpointError(message) from error
    except CheckpointError as error:
        message = f"checkpoint {path} was not written: {error}"
        peers.stop(message)
        raise CheckpointError(message) from error
    peers.go()
    return SaveReport(path=path, size=size, seconds=time.monotonic() - started)


def _stream(
    descriptor: int,
    tree: dict[str, Any],
    entries: Sequence[TensorEntry],
    slice_map: SliceMap,
    parameters: Mapping[str, torch.Tensor],
    adam: Adam,
    peers: SlicePeers,
) -> int:
    """Write all records; return the size of the file."""
    writer = ArchiveWriter(descriptor)
    try:
        begin_archive(writer, tree)
        for index, entry in enumerate(entries):
            writer.begin(f"data/{index}", 4 * math.prod(entry.shape), values=entry.label)
            peers.go()
            local = entry.local(parameters, adam)
            gather_tensor(entry, slice_map, local, peers, lambda chunk: writer.write(tensor_bytes(chunk)))
        for index, name in enumerate(adam):
            step = adam[name]["step"].detach().to("cpu", torch.float32)
            writer.add(f"data/step_{index}", bytes(tensor_bytes(step)))
        return finish_archive(writer)
    finally:
        writer.abandon()
