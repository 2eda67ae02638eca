"""Loading: every rank fills its slices from the mapped file; one that cannot open it asks rank 0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from argonne.checkpoint.adam import ADAM_KEYS
from argonne.checkpoint.reader import CheckpointReader
from argonne.checkpoint.tensor_file import Shape
from argonne.checkpoint.transfer import read_chunks, receive_chunks, serve_chunks
from argonne.errors import CheckpointError
from argonne.tp.slices import SliceMap


@dataclass(frozen=True, kw_only=True)
class CheckpointView:
    """What every rank knows of the chosen checkpoint; the same on all of them."""

    path: Path
    kind: str
    metadata: dict[str, Any]
    tied: bool
    shapes: dict[str, Shape]
    """Shape of every weight by unsharded name, the head included."""
    names: tuple[str, ...]
    """Names in optimizer order; a tied head is not among them."""
    adam_steps: dict[str, float]
    """Adam's step count by name; empty when the checkpoint has no (whole) optimizer state."""
    adam_note: str
    param_groups: tuple[dict[str, Any], ...]
    size: int
    identity: str
    warnings: tuple[str, ...] = ()
    reader: CheckpointReader | None = None
    """This rank's own open file; None where it cannot open the same one."""
    blind_ranks: tuple[int, ...] = ()
    """Ranks without the file, which rank 0 serves."""

    @property
    def step(self) -> int:
        """Optimizer steps done (0 where it does not say)."""
        return int(self.metadata.get("global_step", 0))

    @property
    def model(self) -> Mapping[str, Shape]:
        """Shapes by name, as a `CheckpointReader` has its tensors by name."""
        return self.shapes

    def shape(self, name: str) -> Shape:
        """Unsharded shape of a weight."""
        return self.shapes[name]


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was restored."""

    optimizer_restored: bool
    """True when Adam state came from the file, on all ranks; otherwise on none, and it is zero."""
    warnings: tuple[str, ...]


def view_of(reader: CheckpointReader) -> CheckpointView:
    """The view of a rank that has the checkpoint open (and of a run of one rank)."""
    return CheckpointView(
        path=reader.path,
        kind=reader.kind,
        metadata=dict(reader.metadata),
        tied=reader.tied,
        shapes={name: reader.shape(name) for name in reader.model},
        names=reader.names,
        adam_steps={name: reader.adam_step(name) for name in reader.adam},
        adam_note=reader.adam_note,
        param_groups=tuple(reader.param_groups),
        size=reader.size,
        identity=reader.identity,
        warnings=reader.warnings,
        reader=reader,
    )


def agree_on_error(error: CheckpointError | None, group: dist.ProcessGroup | None) -> None:
    """Raise the first rank's CheckpointError on all ranks, or return on all; collective."""
    messages = gather_objects(str(error) if error else None, group)
    for message in messages:
        if message is not None:
            raise CheckpointError(message)


def gather_objects(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value, by rank."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: Any, group: dist.ProcessGroup | None) -> Any:
    """Rank 0's value on every rank."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def share_checkpoint(
    reader: CheckpointReader | None, rank: int, reopen: Any, group: dist.ProcessGroup | None
) -> CheckpointView:
    """Show rank 0's open checkpoint to all ranks; collective.

    ``reopen(path)`` opens a checkpoint on another rank. A rank whose file is missing or is not the same
    bytes (size and header digest) is served by rank 0.
    """
    shared = broadcast_object(replace(view_of(reader), reader=None) if reader else None, group)
    if rank != 0:
        try:
            reader = reopen(shared.path)
        except (CheckpointError, OSError):
            reader = None
        if reader is not None and reader.identity != shared.identity:
            reader = None
    readable = gather_objects(reader is not None, group)
    blind = tuple(other for other, can_read in enumerate(readable) if not can_read)
    return replace(shared, reader=reader, blind_ranks=blind)


def load_slices(
    view: CheckpointView,
    *,
    slice_map: SliceMap,
    rank: int,
    parameters: Mapping[str, torch.Tensor],
    adam: Mapping[str, Mapping[str, torch.Tensor]],
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
    keys = ("param", *ADAM_KEYS) if with_adam else ("param",)
    problem: CheckpointError | None = None
    for name in slice_map.names:
        for key in keys:
            local = parameters[name] if key == "param" else adam[name][key]
            boxes = slice_map.rectangles(name, rank)
            if view.reader is not None:
                chunks = read_chunks(view.reader, name, key, boxes)
            else:
                chunks = receive_chunks(slice_map.shape(name), boxes, control_group)
            for target, values in chunks:
                if problem is None and not _is_finite(values):
                    problem = CheckpointError(_not_finite(view.path, name, key))
                local.detach()[target].copy_(values)
            if rank == 0:
                assert view.reader is not None
                serve_chunks(view.reader, name, key, slice_map, view.blind_ranks, control_group)
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


def _is_finite(values: torch.Tensor) -> bool:
    return not values.numel() or all(math.isfinite(float(bound)) for bound in torch.aminmax(values))


def _not_finite(path: Path, name: str, key: str) -> str:
    what = name if key == "param" else f"{key} of {name}"
    return f"checkpoint {path}: {what} holds NaN or infinite values; take an earlier checkpoint"
