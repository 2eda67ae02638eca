"""Slices on their way between ranks that share no memory.

At a save the ranks of other nodes send what they own to the ranks that write it. At a load rank 0 serves the
ranks that cannot open the file. Both go over gloo, in float32; a rank that is gone becomes a PeerError that
names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from argonne.checkpoint.reader import CheckpointReader
from argonne.checkpoint.rows import clip_rows, local_index, local_part, row_chunks
from argonne.checkpoint.tensor_file import Shape, read_rectangle
from argonne.errors import PeerError, one_line
from argonne.tp.slices import Rectangle, SliceMap

LOAD_CHUNK_BYTES = 4 << 20
"""Small, for it is what a rank holds beyond its slices."""


class SlicePeers:
    """Tensors between this rank and others."""

    def __init__(self, group: dist.ProcessGroup | None, doing: str = "saved") -> None:
        """``doing`` ("saved", "loaded") goes into errors."""
        self._group = group
        self._doing = doing

    def send(self, tensor: torch.Tensor, rank: int) -> dist.Work:
        """Start sending; ``tensor`` must stay as it is until the work is done."""
        return self._start(dist.isend, tensor, rank)

    def receive(self, tensor: torch.Tensor, rank: int) -> dist.Work:
        """Start receiving into ``tensor``."""
        return self._start(dist.irecv, tensor, rank)

    def wait(self, work: dist.Work, rank: int) -> None:
        """Wait for what was started with ``rank``."""
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(rank, error) from error

    def _start(self, start: Callable[..., dist.Work | None], tensor: torch.Tensor, rank: int) -> dist.Work:
        try:
            work = start(tensor, rank, group=self._group)
        except RuntimeError as error:
            raise self._lost(rank, error) from error
        assert work is not None  # every caller is a member of the group
        return work

    def _lost(self, rank: int, error: RuntimeError) -> PeerError:
        return PeerError(
            f"rank {rank} left while a checkpoint was {self._doing} ({one_line(error)[:80]}): see its output"
        )


# ----------------------------------------------------------------------------------------------------------
# At a save: what ranks of other nodes send to those that write it


def message_numel(rectangles: Sequence[Rectangle], rows: tuple[int, int]) -> int:
    """Elements of a message with these rows of what a rank owns."""
    return sum((high - low) * math.prod(box.size[1:]) for box, low, high in clip_rows(rectangles, *rows))


def pack_message(
    local: torch.Tensor, owned: Sequence[Rectangle], first: int, last: int
) -> torch.Tensor | None:
    """What a rank owns of rows ``first`` to ``last``, box after box, flat; None where that is nothing."""
    parts = [local_part(local, *clipped).reshape(-1) for clipped in clip_rows(owned, first, last)]
    return torch.cat(parts).to("cpu", torch.float32) if parts else None


# ----------------------------------------------------------------------------------------------------------
# At a load: a rank reads its own slices, or rank 0 reads and sends them


Placed = tuple[tuple[slice, ...], torch.Tensor]
"""Where in the local tensor some values go, and the values (float32, CPU)."""


def read_chunks(
    reader: CheckpointReader, name: str, key: str, boxes: Sequence[Rectangle]
) -> Iterator[Placed]:
    """The values of a rank's ``boxes`` of one tensor, from the file."""
    source = reader.source(name, key)
    for box, low, high in _load_pieces(source.shape, boxes):
        values = read_rectangle(source, (low, *box.start[1:]), (high - low, *box.size[1:]))
        yield local_index(box, low, high), values


def serve_chunks(
    reader: CheckpointReader,
    name: str,
    key: str,
    slice_map: SliceMap,
    blind_ranks: Sequence[int],
    group: dist.ProcessGroup | None,
) -> None:
    """Send each of ``blind_ranks`` the values of its boxes of one tensor (rank 0)."""
    peers = SlicePeers(group, "loaded")
    for rank in blind_ranks:
        for _, values in read_chunks(reader, name, key, slice_map.rectangles(name, rank)):
            peers.wait(peers.send(values.contiguous(), rank), rank)


def receive_chunks(
    shape: Shape, boxes: Sequence[Rectangle], group: dist.ProcessGroup | None
) -> Iterator[Placed]:
    """The values of a rank's ``boxes`` of one tensor, from rank 0."""
    peers = SlicePeers(group, "loaded")
    for box, low, high in _load_pieces(shape, boxes):
        values = torch.empty((high - low, *box.size[1:]), dtype=torch.float32)
        peers.wait(peers.receive(values, 0), 0)
        yield local_index(box, low, high), values


def _load_pieces(shape: Shape, boxes: Sequence[Rectangle]) -> Iterator[tuple[Rectangle, int, int]]:
    """Boxes cut by chunks of rows: the order in which values are read, sent and received."""
    for first, last in row_chunks(shape, LOAD_CHUNK_BYTES):
        yield from clip_rows(boxes, first, last)
