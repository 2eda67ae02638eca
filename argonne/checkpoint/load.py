"""Loading: every rank fills its slices from the mapped file; rank 0 serves those that cannot open it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from argonne.checkpoint.adam import ADAM_KEYS
from argonne.checkpoint.contents import Adam, TensorEntry
from argonne.checkpoint.finite import all_finite
from argonne.checkpoint.transfer import read_chunks, receive_chunks, serve_chunks
from argonne.checkpoint.view import CheckpointView, agree_on_error
from argonne.errors import CheckpointError
from argonne.tp.slices import SliceMap


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was restored."""

    optimizer_restored: bool
    """True when Adam state came from the file, on all ranks; otherwise on none, and it is zero."""
    warnings: tuple[str, ...]


def load_slices(
    view: CheckpointView,
    *,
    slice_map: SliceMap,
    rank: int,
    parameters: Mapping[str, torch.Tensor],
    adam: Adam,
    control_group: dist.ProcessGroup | None,
) -> LoadReport:
    """Fill this rank's weights and Adam state from the checkpoint, in place; collective.

    ``parameters`` and ``adam`` are as in ``save_checkpoint``; padding is left as it is. The file's values
    are converted to float32 on the way. Adam state is filled on all ranks or, where the file has none, on
    none (said in the report). Raises the same CheckpointError on all ranks where names or shapes differ or
    a value is not finite.
    """
    agree_on_error(_mismatch(view, slice_map), control_group)
    with_adam = bool(view.adam_steps) and bool(adam)
    problem: CheckpointError | None = None
    for name in slice_map.names:
        for key in ("param", *(ADAM_KEYS if with_adam else ())):
            entry = TensorEntry(name, key, slice_map.shape(name))
            local = entry.local(parameters, adam).detach()
            finite = _fill(entry, local, view, slice_map, rank, control_group)
            if problem is None and not finite:
                problem = CheckpointError(
                    f"checkpoint {view.path}: {entry.label} holds NaN or infinite values; "
                    "take an earlier checkpoint"
                )
        if with_adam:
            steps = view.adam_steps[name]
            if problem is None and not 0 <= steps < math.inf:
                problem = CheckpointError(f"checkpoint {view.path}: Adam's step count of {name} is {steps}")
            adam[name]["step"].fill_(steps)
    agree_on_error(problem, control_group)
    warnings = view.warnings
    if adam and not with_adam:
        warnings = (*warnings, f"Adam starts from zero: {view.adam_note}")
    return LoadReport(optimizer_restored=with_adam, warnings=warnings)


def _mismatch(view: CheckpointView, slice_map: SliceMap) -> CheckpointError | None:
    missing = [name for name in slice_map.names if name not in view.shapes]
    extra = [name for name in view.names if name not in slice_map.names]
    if missing or extra:
        described = [f"{name} is not in the checkpoint" for name in missing[:3]]
        described += [f"{name} is not in the model" for name in extra[:3]]
        return CheckpointError(f"checkpoint {view.path} is of another model: {'; '.join(described)}")
    for name in slice_map.names:
        if view.shape(name) != slice_map.shape(name):
            return CheckpointError(
                f"checkpoint {view.path} is of another model: {name} is {view.shape(name)} in the checkpoint "
                f"and {slice_map.shape(name)} in the model"
            )
    return None


def _fill(
    entry: TensorEntry,
    local: torch.Tensor,
    view: CheckpointView,
    slice_map: SliceMap,
    rank: int,
    group: dist.ProcessGroup | None,
) -> bool:
    """Fill this rank's slices of one tensor, on rank 0 serve the blind ranks; whether all of it is finite.

    The values go on where one is not finite: every rank must take part in every tensor.
    """
    boxes = slice_map.rectangles(entry.name, rank)
    if view.reader is not None:
        chunks = read_chunks(view.reader, entry.name, entry.key, boxes)
    else:
        chunks = receive_chunks(entry.shape, boxes, group)
    finite = True
    for target, values in chunks:
        finite = finite and all_finite(values)
        local[target].copy_(values)
    if rank == 0:
        assert view.reader is not None
        serve_chunks(view.reader, entry.name, entry.key, slice_map, view.blind_ranks, group)
    return finite
