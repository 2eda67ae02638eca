"""Slices on their way between the ranks and rank 0.

At a save rank 0 gathers each tensor, chunk of rows by chunk of rows, from the ranks that own its elements.
At a load rank 0 serves the ranks that cannot open the file. Both go over gloo, in float32; a rank that is
gone becomes a PeerError that names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from argonne.checkpoint.contents import Adam, TensorEntry
from argonne.checkpoint.reader import CheckpointReader
from argonne.checkpoint.rows import clip_rows, local_index, local_part, row_chunks
from argonne.checkpoint.tensor_file import Shape, read_rectangle
from argonne.errors import CheckpointError, PeerError, one_line
from argonne.tp.slices import Rectangle, SliceMap

LOAD_CHUNK_BYTES = 4 << 20
"""Small, for it is what a rank holds beyond its slices."""

_GO = 0


class SlicePeers:
    """Messages between this rank and others: tensors, and rank 0's word, go or stop."""

    def __init__(self, ranks: Sequence[int], group: dist.ProcessGroup | None, doing: str = "saved") -> None:
        """``ranks`` are those that rank 0 speaks to; ``doing`` ("saved", "loaded") goes into errors."""
        self.ranks = tuple(ranks)
        self._group = group
        self._doing = doing

    def go(self) -> None:
        """Tell every rank to go on."""
        for rank in self.ranks:
            self.wait(self.send(torch.tensor([_GO]), rank), rank)

    def stop(self, message: str) -> None:
        """Tell every rank to stop, and why."""
        text = torch.tensor(list(message.encode()), dtype=torch.uint8)
        for rank in self.ranks:
            self.wait(self.send(torch.tensor([len(text)]), rank), rank)
            self.wait(self.send(text, rank), rank)

    def await_word(self) -> None:
        """Wait for rank 0's word; raise its CheckpointError when it says stop."""
        word = torch.zeros(1, dtype=torch.int64)
        self.wait(self.receive(word, 0), 0)
        if int(word) != _GO:
            text = torch.zeros(int(word), dtype=torch.uint8)
            self.wait(self.receive(text, 0), 0)
            raise CheckpointError(bytes(text.tolist()).decode())

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
# At a save: rank 0 gathers, the others send


def gather_tensor(
    entry: TensorEntry,
    slice_map: SliceMap,
    local: torch.Tensor,
    peers: SlicePeers,
    write: Callable[[torch.Tensor], None],
) -> None:
    """Call ``write`` with the chunks of one tensor in order, float32 on the CPU (rank 0).

    A chunk is valid until ``write`` returns: its memory is used again. Where ``write`` raises OSError or
    CheckpointError, the rest of the tensor is received first, unwritten, so that no rank is left sending;
    then the error goes on.
    """
    problem: OSError | CheckpointError | None = None
    for chunk in _gathered_chunks(entry, slice_map, local, peers):
        if problem is None:
            try:
                write(chunk)
            except (OSError, CheckpointError) as error:
                problem = error
    if problem is not None:
        raise problem


def _gathered_chunks(
    entry: TensorEntry, slice_map: SliceMap, local: torch.Tensor, peers: SlicePeers
) -> Iterator[torch.Tensor]:
    """The chunks of one tensor, each received while its predecessor is used."""
    chunks = row_chunks(entry.shape)
    owned = {rank: slice_map.owned(entry.name, rank) for rank in (0, *peers.ranks)}
    pending = _receive(owned, chunks[0], peers) if chunks else []
    space = torch.empty(0)
    for index, (first, last) in enumerate(chunks):
        arriving = pending
        pending = _receive(owned, chunks[index + 1], peers) if index + 1 < len(chunks) else []
        whole = _own_rows(owned[0], local, entry.shape, first, last)
        if whole is not None:
            yield whole
            continue
        if not space.numel():
            space = torch.empty((last - first, *entry.shape[1:]), dtype=torch.float32)
        chunk = space[: last - first]
        for rectangle, low, high in clip_rows(owned[0], first, last):
            place = (slice(low - first, high - first), *rectangle.unsharded_index[1:])
            chunk[place].copy_(local_part(local, rectangle, low, high))
        for rank, buffer, work in arriving:
            peers.wait(work, rank)
            for rectangle, low, high in clip_rows(owned[rank], first, last):
                place = (slice(low - first, high - first), *rectangle.unsharded_index[1:])
                target = chunk[place]
                target.copy_(buffer[: target.numel()].view(target.shape))
                buffer = buffer[target.numel() :]
        yield chunk


def _own_rows(
    owned: Sequence[Rectangle], local: torch.Tensor, shape: Sequence[int], first: int, last: int
) -> torch.Tensor | None:
    """Rank 0's own memory of rows ``first`` to ``last`` where it can be written as it is."""
    clipped = clip_rows(owned, first, last)
    if len(clipped) != 1 or local.device.type != "cpu" or local.dtype != torch.float32:
        return None
    part = local_part(local, *clipped[0])
    return part if part.shape == (last - first, *shape[1:]) and part.is_contiguous() else None


def _receive(
    owned: Mapping[int, Sequence[Rectangle]], rows: tuple[int, int], peers: SlicePeers
) -> list[tuple[int, torch.Tensor, dist.Work]]:
    """Start receiving what each peer owns of these rows."""
    arriving = []
    for rank in peers.ranks:
        count = message_numel(owned[rank], rows)
        if count:
            buffer = torch.empty(count, dtype=torch.float32)
            arriving.append((rank, buffer, peers.receive(buffer, rank)))
    return arriving


def message_numel(rectangles: Sequence[Rectangle], rows: tuple[int, int]) -> int:
    """Elements of a message with these rows of what a rank owns."""
    return sum((high - low) * math.prod(box.size[1:]) for box, low, high in clip_rows(rectangles, *rows))


def pack_message(
    local: torch.Tensor, owned: Sequence[Rectangle], first: int, last: int
) -> torch.Tensor | None:
    """What a rank owns of rows ``first`` to ``last``, box after box, flat; None where that is nothing."""
    parts = [local_part(local, *clipped).reshape(-1) for clipped in clip_rows(owned, first, last)]
    return torch.cat(parts).to("cpu", torch.float32) if parts else None


def send_slices(
    entries: Sequence[TensorEntry],
    slice_map: SliceMap,
    rank: int,
    parameters: Mapping[str, torch.Tensor],
    adam: Adam,
    control_group: dist.ProcessGroup | None,
) -> None:
    """Send what this rank owns of each tensor that rank 0 asks for (every rank but 0)."""
    peers = SlicePeers((), control_group)
    for entry in entries:
        peers.await_word()
        local = entry.local(parameters, adam)
        owned = slice_map.owned(entry.name, rank)
        sending: list[tuple[torch.Tensor, dist.Work]] = []
        for first, last in row_chunks(entry.shape):
            message = pack_message(local, owned, first, last)
            if message is None:
                continue
            if sending:
                peers.wait(sending.pop()[1], 0)
            sending.append((message, peers.send(message, 0)))
        for _, work in sending:
            peers.wait(work, 0)
    peers.await_word()


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
    peers = SlicePeers(blind_ranks, group, "loaded")
    for rank in blind_ranks:
        for _, values in read_chunks(reader, name, key, slice_map.rectangles(name, rank)):
            peers.wait(peers.send(values.contiguous(), rank), rank)


def receive_chunks(
    shape: Shape, boxes: Sequence[Rectangle], group: dist.ProcessGroup | None
) -> Iterator[Placed]:
    """The values of a rank's ``boxes`` of one tensor, from rank 0."""
    peers = SlicePeers((), group, "loaded")
    for box, low, high in _load_pieces(shape, boxes):
        values = torch.empty((high - low, *box.size[1:]), dtype=torch.float32)
        peers.wait(peers.receive(values, 0), 0)
        yield local_index(box, low, high), values


def _load_pieces(shape: Shape, boxes: Sequence[Rectangle]) -> Iterator[tuple[Rectangle, int, int]]:
    """Boxes cut by chunks of rows: the order in which values are read, sent and received."""
    for first, last in row_chunks(shape, LOAD_CHUNK_BYTES):
        yield from clip_rows(boxes, first, last)
