"""Saving: several ranks write their parts of the one file, from memory that the ranks of a node share.

Nothing is gathered whole, and within rank 0's node no slice goes through a network: round by round its ranks
put a few pieces of the file together in shared memory (`window`), and each writes its share of the file at
its place, checksums and all. Ranks of other nodes send their slices to the rank that writes them. Rank 0
combines the checksums, writes what is left between the parts and the directory, and gives the file its name.
Between two rounds all ranks hear how the others fare: a fault ends the save on all.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from argonne.checkpoint.archive import tensor_bytes
from argonne.checkpoint.archive_layout import ArchiveLayout
from argonne.checkpoint.commit import commit, failure_reason, temporary_file
from argonne.checkpoint.contents import (
    Adam,
    TensorEntry,
    build_tree,
    estimate_checkpoint_bytes,
    first_records,
    last_records,
)
from argonne.checkpoint.meeting import Meeting
from argonne.checkpoint.part_writer import PartWriter, Run, combined, unwritten_gaps
from argonne.checkpoint.pieces import Piece, in_rounds
from argonne.checkpoint.reader import FORMAT_KEY, FORMAT_VERSION
from argonne.checkpoint.safe_pickle import dump_tree
from argonne.checkpoint.team import Team
from argonne.checkpoint.transfer import SlicePeers
from argonne.errors import CheckpointError
from argonne.tp.slices import SliceMap

Records = list[tuple[str, bytes]]


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
    pulse: Callable[[], None] = lambda: None,
) -> SaveReport | None:
    """Write one whole checkpoint; collective over ``control_group`` (gloo, all ranks).

    ``parameters`` are this rank's local tensors by unsharded name; ``adam[name]`` holds ``step``,
    ``exp_avg`` and ``exp_avg_sq``, or ``adam`` is empty on every rank before the first step. None of them may
    change before this returns. ``param_group`` gives the optimizer's options (lr, betas, eps, weight_decay;
    what is left out takes AdamW's default). ``metadata`` holds the other keys of the file, plain containers
    and numbers. ``spare_bytes`` must remain free on the disk beside the new file. ``pulse`` is called as the
    save goes on.

    Returns a report on rank 0 and None elsewhere. Raises the same CheckpointError on all ranks when the
    file could not be written whole (the temporary file is gone then and the folder as it was), PeerError
    where a rank left.
    """
    started = time.monotonic()
    peers = SlicePeers(control_group)
    meeting = Meeting(peers, rank, slice_map.world_size, pulse)
    need = estimate_checkpoint_bytes(slice_map, with_adam=bool(adam)) + spare_bytes
    size = 0
    try:
        with Team(parameters, adam, slice_map, rank, peers, meeting) as team:
            if rank == 0:
                first = _first_records(team.entries, param_group, metadata, tied)
                with temporary_file(path, need) as (descriptor, temporary):
                    size = _lead(team, first, descriptor, temporary)
                    commit(descriptor, temporary, path, size)
            else:
                _follow(team)
            meeting.gather(None)
    except OSError as error:
        reason = failure_reason(error, path.parent, need)
        raise meeting.stop(f"checkpoint {path} could not be written: {reason}") from error
    except CheckpointError as error:
        raise meeting.stop(f"checkpoint {path} was not written: {error}") from error
    return SaveReport(path=path, size=size, seconds=time.monotonic() - started) if rank == 0 else None


def _first_records(
    entries: Sequence[TensorEntry], param_group: Mapping[str, Any], metadata: Mapping[str, Any], tied: bool
) -> Records:
    tree = build_tree(entries, param_group, metadata, tied=tied)
    tree[FORMAT_KEY] = FORMAT_VERSION
    return first_records(dump_tree(tree))


def _layout(first: Sequence[tuple[str, int]], entries: Sequence[TensorEntry], last: Records) -> ArchiveLayout:
    tensors = [(f"data/{index}", entry.size) for index, entry in enumerate(entries)]
    return ArchiveLayout([*first, *tensors, *((name, len(data)) for name, data in last)])


def _last_records(team: Team) -> Records:
    steps = [state["step"].detach().to("cpu", torch.float32) for state in team.adam.values()]
    return last_records([bytes(tensor_bytes(step)) for step in steps])


def _lead(team: Team, first: Records, descriptor: int, temporary: Path) -> int:
    """Rank 0's part, and what holds the parts together; the file's bytes."""
    sizes = [(name, len(data)) for name, data in first]
    team.meet((str(temporary), sizes))
    last = _last_records(team)
    layout = _layout(sizes, team.entries, last)
    parts = _write_parts(team, layout, len(first), descriptor)
    return _join(descriptor, layout, first, last, parts)


def _follow(team: Team) -> None:
    """The part of a rank that writes to rank 0's file, or sends what others write."""
    _, first = team.meet(None)
    layout = _layout(first, team.entries, _last_records(team))
    _write_parts(team, layout, len(first), team.descriptor)


def _write_parts(team: Team, layout: ArchiveLayout, before: int, descriptor: int | None) -> list[list[Run]]:
    """Write or send this rank's share; every writer's runs, in the order of the file."""
    plan = team.plan()
    rounds, mine, near = in_rounds(plan), plan.get(team.rank, []), team.rank in team.near
    with contextlib.ExitStack() as stack:
        part = None
        if mine and descriptor is not None:
            part = PartWriter(descriptor, layout, before, mine[0])
            stack.callback(part.abandon)
        for pieces, following in itertools.pairwise([[], *rounds, []]):
            # A half of a window is filled again once all have written the round before this one.
            if part is not None:
                _write_round(team, part, [piece for piece in pieces if piece.writer == team.rank])
            elif not near:
                team.send(pieces)
            if near:
                team.put(following)
            team.meeting.gather(None)
        if part is not None:
            part.finish()
        told = team.meeting.gather(part.runs if part is not None else [])
    return [told[rank] for rank in plan]


def _write_round(team: Team, part: PartWriter, pieces: Sequence[Piece]) -> None:
    """Write some pieces; where that fails, what others send of them is received first."""
    problem: OSError | CheckpointError | None = None
    for piece, values in team.assembled(pieces):
        if problem is None:
            try:
                part.write(piece, values)
            except (OSError, CheckpointError) as error:
                problem = error
    if problem is not None:
        raise problem


def _join(
    descriptor: int, layout: ArchiveLayout, first: Records, last: Records, parts: list[list[Run]]
) -> int:
    """Write what stands in front of, between and behind the parts; the file's bytes."""
    checksums = combined([run for part in parts for run in part])
    before, count = len(first), len(checksums)
    for index, (_, data) in enumerate(first):
        layout.records[index].crc = zlib.crc32(data)
    for index, checksum in checksums.items():
        layout.records[before + index].crc = checksum
    for index, (_, data) in enumerate(last):
        layout.records[before + count + index].crc = zlib.crc32(data)
    head = [layout.gap(-1)]
    for index, (_, data) in enumerate(first):
        head += [data, layout.gap(index)]
    _put(descriptor, b"".join(head), 0)
    for index in unwritten_gaps(parts, count):
        _put(descriptor, layout.gap(before + index), layout.end_of(before + index))
    tail = [layout.gap(before + count - 1)]
    for index, (_, data) in enumerate(last):
        tail += [data, layout.gap(before + count + index)]
    start, ending = layout.end_of(before + count - 1), b"".join([*tail, layout.closing()])
    _put(descriptor, ending, start)
    return start + len(ending)


def _put(descriptor: int, data: bytes, position: int) -> None:
    rest = memoryview(data)
    while rest:
        count = os.pwrite(descriptor, rest, position)
        rest, position = rest[count:], position + count
