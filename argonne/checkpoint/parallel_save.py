"""Saving from copies in host memory: several ranks write their parts of the one file.

The ranks of rank 0's node see each other's copies, so no byte of theirs is sent: each writes its share of the
file at its place, checksums and all. Ranks of other nodes send their slices to the rank that writes them.
Rank 0 combines the checksums, writes what is left between the parts and the directory, and gives the file
its name. Between two rounds of pieces all ranks hear how the others fare: a fault ends the save on all.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from argonne.checkpoint.archive import tensor_bytes
from argonne.checkpoint.archive_layout import ArchiveLayout
from argonne.checkpoint.commit import commit, failure_reason, temporary_file
from argonne.checkpoint.contents import (
    TensorEntry,
    build_tree,
    estimate_checkpoint_bytes,
    first_records,
    last_records,
)
from argonne.checkpoint.host_copy import HostCopy
from argonne.checkpoint.meeting import Meeting
from argonne.checkpoint.part_writer import PartWriter, Run, combined, unwritten_gaps
from argonne.checkpoint.pieces import Piece, in_rounds, plan_pieces
from argonne.checkpoint.reader import FORMAT_KEY, FORMAT_VERSION
from argonne.checkpoint.safe_pickle import dump_tree
from argonne.checkpoint.save import SaveReport
from argonne.checkpoint.team import Team
from argonne.errors import CheckpointError
from argonne.tp.slices import SliceMap

Records = list[tuple[str, bytes]]


def save_copies(
    path: Path,
    *,
    copy: HostCopy,
    slice_map: SliceMap,
    rank: int,
    param_group: Mapping[str, Any],
    metadata: Mapping[str, Any],
    tied: bool,
    control_group: dist.ProcessGroup | None,
    spare_bytes: int = 0,
    pulse: Callable[[], None] = lambda: None,
) -> SaveReport | None:
    """Write one whole checkpoint of what the ranks' copies hold; collective over ``control_group`` (gloo).

    The file, the report and the errors are those of `save_checkpoint`. ``pulse`` is called as it goes on.
    """
    started = time.monotonic()
    meeting = Meeting(control_group, slice_map.world_size, pulse)
    team = Team(copy, slice_map, rank, control_group, meeting)
    need = estimate_checkpoint_bytes(slice_map, with_adam=bool(copy.adam)) + spare_bytes
    size = 0
    try:
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
    steps = [state["step"].detach().to("cpu", torch.float32) for state in team.copy.adam.values()]
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
    temporary, first = team.meet(None)
    layout = _layout(first, team.entries, _last_records(team))
    with team.opened(temporary) as descriptor:
        _write_parts(team, layout, len(first), descriptor)


def _write_parts(team: Team, layout: ArchiveLayout, before: int, descriptor: int | None) -> list[list[Run]]:
    """Write or send this rank's share; every writer's runs, in the order of the file."""
    plan = plan_pieces(team.entries, team.near)
    mine = plan.get(team.rank, [])
    with contextlib.ExitStack() as stack:
        part = None
        if mine and descriptor is not None:
            part = PartWriter(descriptor, layout, before, mine[0])
            stack.callback(part.abandon)
        for pieces in in_rounds(plan):
            team.meeting.gather(None)
            if team.rank not in team.near:
                team.send(pieces)
                continue
            own = [piece for piece in pieces if piece.writer == team.rank]
            if part is not None and own:
                _write_round(team, part, own)
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
