"""One checkpoint as all ranks see it: each opens the file that rank 0 opened, or is served by rank 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from argonne.checkpoint.reader import KIND_WEIGHTS, CheckpointReader, saved_position
from argonne.checkpoint.tensor_file import Shape
from argonne.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class CheckpointView:
    """What every rank knows of the chosen checkpoint; the same on all but for ``reader``."""

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
    """This rank's own open file; None where it cannot open the same file."""
    blind_ranks: tuple[int, ...] = ()
    """Ranks without the file, which rank 0 serves."""

    @property
    def step(self) -> int:
        """Optimizer steps done (0 where it does not say)."""
        return int(self.metadata.get("global_step", 0))

    @property
    def weights_only(self) -> bool:
        """Training begins with these weights at step 0, and takes nothing else from here."""
        return self.kind == KIND_WEIGHTS

    @property
    def saved_position(self) -> dict[str, Any] | None:
        """Where the data goes on; None: at its start."""
        return saved_position(self.kind, self.metadata)

    @property
    def model(self) -> Mapping[str, Shape]:
        """Shapes by name, as a `CheckpointReader` has its tensors by name."""
        return self.shapes

    def shape(self, name: str) -> Shape:
        """Unsharded shape of a weight."""
        return self.shapes[name]


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
    reader: CheckpointReader | None,
    rank: int,
    reopen: Callable[[CheckpointView], CheckpointReader],
    group: dist.ProcessGroup | None,
) -> CheckpointView:
    """Show rank 0's open checkpoint to all ranks; collective.

    ``reopen(view)`` opens the checkpoint of rank 0's view on another rank. A rank whose file is missing or is
    not the same bytes (size and header digest) is served by rank 0.
    """
    shared = broadcast_object(replace(view_of(reader), reader=None) if reader else None, group)
    if rank != 0:
        try:
            reader = reopen(shared)
        except (CheckpointError, OSError):
            reader = None
        if reader is not None and reader.identity != shared.identity:
            reader = None
    readable = gather_objects(reader is not None, group)
    blind = tuple(other for other, can_read in enumerate(readable) if not can_read)
    return replace(shared, reader=reader, blind_ranks=blind)
